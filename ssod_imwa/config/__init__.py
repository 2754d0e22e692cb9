"""The configuration tree and its reader."""

from ssod_imwa.config.defaults import get_cfg
from ssod_imwa.config.reader import check_config, load_config

__all__ = ["check_config", "get_cfg", "load_config"]
