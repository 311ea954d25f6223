"""Settings are in pyproject.toml; this only keeps an editable install quiet."""

import warnings

from setuptools import setup
from setuptools.warnings import InformationOnly

warnings.filterwarnings("ignore", message="Editable installation", category=InformationOnly)
setup()
