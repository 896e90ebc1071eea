"""What LoRA trains beside one weight: the pair A, B, DoRA's magnitudes and the pair's bias."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class LowRankPair:
    """A [rank, in, …] and B [out, rank, …]: their product is added to a weight [out, in, …].

    magnitude: DoRA's length of each row of the weight, [out], beside convolutions [1, out, 1, 1]. bias: of B
    (lora_bias), [out].
    """

    a: torch.Tensor
    b: torch.Tensor
    magnitude: torch.Tensor | None = None
    bias: torch.Tensor | None = None

    def tensors(self, module: str) -> dict[str, torch.Tensor]:
        """The pair under the keys that peft reads, without the prefix of a saved adapter."""
        found = {f"{module}.lora_A.weight": self.a, f"{module}.lora_B.weight": self.b}
        if self.magnitude is not None:
            found[f"{module}.lora_magnitude_vector"] = self.magnitude
        if self.bias is not None:
            found[f"{module}.lora_B.bias"] = self.bias
        return found
