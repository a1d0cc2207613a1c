"""The log."""

import logging

logger = logging.getLogger("webui_stand_in")
logger.setLevel(logging.INFO)
logger.addHandler(logging.StreamHandler())
