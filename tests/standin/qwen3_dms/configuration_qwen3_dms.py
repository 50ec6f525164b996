"""Config of the stand-in: Qwen3's, with what the eviction needs."""

from typing import Any

import transformers


class Qwen3Config(transformers.Qwen3Config):
    """Named as the checkpoint's own."""

    def __init__(
        self,
        dms_alpha_scale: float = 100.0,
        dms_initial_alpha_offset: float = 5.0,
        dms_window_size: int = 512,
        dms_cr: int = 8,
        **kwargs: Any,
    ) -> None:
        self.dms_alpha_scale = dms_alpha_scale
        self.dms_initial_alpha_offset = dms_initial_alpha_offset
        self.dms_window_size = dms_window_size
        self.dms_cr = dms_cr
        super().__init__(**kwargs)
        if "pad_token_id" not in kwargs:  # transformers 5 no longer sets it on a config class that is not its own
            del self.pad_token_id
