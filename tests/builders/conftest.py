from tests.training.conftest import config

__all__ = ["config"]
