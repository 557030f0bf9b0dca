from tests.train.conftest import config

__all__ = ["config"]
