from tests.train.conftest import config as config
