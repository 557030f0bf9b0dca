"""Python runs this at the start of each process that has this folder in PYTHONPATH."""

from tests.pictures import use_blank_pictures

use_blank_pictures()
