"""FlashAttention 3 from the wheel `fa3-fwd`, which diffusers doesn't look for."""

import importlib
import logging
from importlib.util import find_spec

logger = logging.getLogger(__name__)


def adopt_wheel() -> None:
    """Let diffusers find FlashAttention 3 where it is the wheel `fa3-fwd`, whose modules have other names."""
    import torch
    from diffusers.models import attention_dispatch as dispatcher

    if dispatcher._CAN_USE_FLASH_ATTN_3 or find_spec("fa3_fwd_interface") is None:
        return
    # It has kernels for this one only.
    if not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9:
        return
    try:
        wheel = importlib.import_module("fa3_fwd_interface")
    except (ImportError, OSError, RuntimeError) as error:
        logger.warning("fa3-fwd is installed, but can't be used: %s", error)
        return
    dispatcher.flash_attn_3_func = wheel.flash_attn_func
    dispatcher.flash_attn_3_varlen_func = wheel.flash_attn_varlen_func
    dispatcher._CAN_USE_FLASH_ATTN_3 = True
