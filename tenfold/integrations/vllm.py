"""Plug-in of vLLM: compressed checkpoints in vLLM's own model classes, found by its entry point ``vllm.general_plugins``.

vLLM puts query, key and value, and gate and up, into one layer each. Such a layer gets one part per matrix of the checkpoint, and
the outputs are concatenated. Parts may be pruned or factorised; matrices that the checkpoint holds as they were are dense parts.
Factors are read and multiplied by ``tenfold.nn.FactorizedLinear``, on one device: tensor parallelism is refused.

This module imports vLLM, which tenfold does not install.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase, UnquantizedLinearMethod  # pyright: ignore[reportMissingImports]
from vllm.model_executor.layers.quantization import register_quantization_config  # pyright: ignore[reportMissingImports]
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig  # pyright: ignore[reportMissingImports]

from tenfold.models.checkpoint_format import read_structures
from tenfold.models.quantization_config import METHOD, TenfoldConfig
from tenfold.nn import FactorizedLinear
from tenfold.structure import Dense, Structure

ELSEWHERE = "export it with `tenfold export --to remote-code`, which vLLM runs by its transformers backend"
SHARDS = {"q_proj": "q", "k_proj": "k", "v_proj": "v"}  # vLLM's names of the parts of a fused layer; numbers otherwise


class TenfoldVllmConfig(QuantizationConfig):
    """What vLLM asks about a compressed checkpoint.

    Args:
        config: ``quantization_config`` of its ``config.json``.

    Raises:
        ValueError: it has shared factors or a factorised embedding, which have no place in vLLM's layers.
    """

    def __init__(self, config: dict[str, Any]):
        super().__init__()
        self.config = TenfoldConfig(**config)
        self.structures = read_structures(self.config)
        for path, site in self.config.sites.items():
            if site.get("shared"):
                raise ValueError(f"{path} shares factors with other layers, which vLLM's layers can't; {ELSEWHERE}")

    @classmethod
    def get_name(cls) -> str:
        return METHOD

    @classmethod
    def get_supported_act_dtypes(cls) -> list[torch.dtype]:
        return [torch.float32, torch.bfloat16, torch.float16]

    @classmethod
    def get_min_capability(cls) -> int:
        return 0

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> TenfoldVllmConfig:
        return cls(config)

    def get_quant_method(self, layer: nn.Module, prefix: str) -> LinearMethodBase | None:
        """Return how the layer ``prefix`` is read and run.

        Raises:
            ValueError: it is an embedding or a head that is factorised.
        """
        parent, _, name = prefix.rpartition(".")
        inside = self.packed_modules_mapping.get(name, [name])
        paths = [f"{parent}.{part}" if parent else part for part in inside]
        if not any(path in self.structures for path in paths):
            return UnquantizedLinearMethod() if isinstance(layer, LinearBase) else None
        if not isinstance(layer, LinearBase):
            raise ValueError(f"{prefix} is factorised and no linear layer of vLLM; {ELSEWHERE}")
        shards = [SHARDS.get(part, number) for number, part in enumerate(inside)] if len(inside) > 1 else [None]
        return TenfoldLinearMethod(
            {shard: self.structures.get(path) for shard, path in zip(shards, paths, strict=True)}
        )


class TenfoldLinearMethod(LinearMethodBase):
    """Parts of one layer of vLLM, whose outputs are concatenated.

    Args:
        structures: ``{shard: structure}`` in the order of the outputs; None for a matrix that is stored as it was.
    """

    def __init__(self, structures: dict[Any, Structure | None]):
        self.structures = structures

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra: Any,
    ) -> None:
        """Register an empty parameter per name of a factor, whose loader keeps what the checkpoint has.

        Raises:
            ValueError: the layer is spread over several devices.
        """
        if input_size_per_partition != input_size or sum(output_partition_sizes) != output_size:
            raise ValueError("a compressed checkpoint runs on one device in vLLM: set tensor_parallel_size to 1")
        layer.factor_dtype, layer.loaded = params_dtype, {shard: {} for shard in self.structures}
        layer.dense_shapes = dict(zip(self.structures, output_partition_sizes, strict=False)), input_size
        names = {name for one in self.structures.values() for name in _stored_names(one)}
        for name in sorted(names):
            empty = nn.Parameter(torch.empty(0, dtype=params_dtype), requires_grad=False)
            empty.weight_loader = partial(_keep, layer.loaded, name)  # type: ignore[attr-defined]
            layer.register_parameter(name, empty)

    def process_weights_after_loading(self, layer: Any) -> None:
        """Make the parts of what was loaded.

        Raises:
            ValueError: a factor is missing or has another shape.
        """
        parts = nn.ModuleList()
        heights, width = layer.dense_shapes
        for shard, structure in self.structures.items():
            loaded = layer.loaded[shard]
            if structure is None:
                structure = Dense(out_features=heights[shard], in_features=width)
                loaded = {"matrix": loaded["weight"]} if "weight" in loaded else {}
            if missing := sorted({*structure.factor_shapes(), *structure.index_shapes()} - loaded.keys()):
                raise ValueError(
                    f"the checkpoint lacks {', '.join(missing)} of part {shard} of this layer; copy it again"
                )
            device = next(iter(loaded.values())).device
            part = FactorizedLinear(structure, bias=False, device=device, dtype=layer.factor_dtype)
            part.set_factors(loaded)
            parts.append(part.requires_grad_(False).eval())
        for name in {name for one in self.structures.values() for name in _stored_names(one)}:
            delattr(layer, name)
        del layer.loaded
        layer.parts = parts

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return ``y (..., out)`` for ``x (..., in)``."""
        found = [part(x) for part in layer.parts]
        y = found[0] if len(found) == 1 else torch.cat(found, -1)
        return y if bias is None else y + bias


def _stored_names(structure: Structure | None) -> list[str]:
    return ["weight"] if structure is None else [*structure.factor_shapes(), *structure.index_shapes()]


def _keep(
    loaded: dict[Any, dict[str, Tensor]], name: str, parameter: nn.Parameter, value: Tensor, shard: Any = None
) -> None:
    """Keep a tensor of the checkpoint until all of its layer are there."""
    loaded[shard][name] = value.to(parameter.device)


def register() -> None:
    """Register the method with vLLM; called by its entry point in every process."""
    register_quantization_config(METHOD)(TenfoldVllmConfig)
