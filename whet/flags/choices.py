"""Choices that several commands offer."""

from typing import Literal

Device = Literal["auto", "cpu", "cuda"]
Precision = Literal["auto", "bf16", "float32"]
SaveDtype = Literal["same", "bfloat16", "float16", "float32"]
Recompute = Literal["none", "selective", "full"]
Schedule = Literal["cosine", "linear", "constant", "wsd"]
Refused = Literal["error", "drop", "drop_unproven"]
Overlong = Literal["error", "drop", "truncate"]
Advantage = Literal["group", "plain", "batch", "leave_one_out"]
PolicyLoss = Literal["clip", "gspo", "cispo"]
Normalize = Literal["tokens", "sequences", "constant"]
Truncated = Literal["score", "penalty", "mask"]
