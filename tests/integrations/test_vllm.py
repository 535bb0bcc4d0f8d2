"""The plug-in of vLLM, with stand-ins of the four classes of vLLM that it uses, which load and call as vLLM 0.33 does."""

import sys
from importlib.metadata import entry_points
from types import ModuleType

import pytest
import torch
from models import toys
from torch import nn

from tenfold.models.plan import make_plan
from tenfold.models.recipe import load_recipe
from tenfold.models.sites import find_sites, weight_of
from tenfold.models.surgery import replace
from tenfold.structure import LowRank, Structure

PACKED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
SHARD_OF = {"q_proj": "q", "k_proj": "k", "v_proj": "v", "gate_proj": 0, "up_proj": 1}


class Linear(nn.Module):
    """A linear layer of vLLM: its method makes the weights, each of which has a loader."""

    def __init__(self, inner: int, outs: list[int], config, prefix: str):
        super().__init__()
        self.method = config.get_quant_method(self, prefix)
        if self.method is not None:
            self.method.create_weights(self, inner, outs, inner, sum(outs), torch.float32, weight_loader=None)

    def load(self, name: str, value: torch.Tensor, shard=None) -> None:
        parameter = self.get_parameter(name)
        parameter.weight_loader(parameter, value, *([] if shard is None else [shard]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.method.apply(self, x)


class Plain:
    def create_weights(self, *arguments, **more) -> None:
        pass


class Config:
    def __init__(self):
        self.packed_modules_mapping = PACKED


@pytest.fixture
def vllm(monkeypatch):
    """Return the plug-in, imported beside stand-ins of vLLM."""
    registered = {}
    contents = {
        "vllm": {},
        "vllm.model_executor": {},
        "vllm.model_executor.layers": {},
        "vllm.model_executor.layers.linear": {
            "LinearBase": Linear,
            "LinearMethodBase": object,
            "UnquantizedLinearMethod": Plain,
        },
        "vllm.model_executor.layers.quantization": {
            "register_quantization_config": lambda name: lambda kind: registered.setdefault(name, kind)
        },
        "vllm.model_executor.layers.quantization.base_config": {"QuantizationConfig": Config},
    }
    for name, values in contents.items():
        module = ModuleType(name)
        vars(module).update(values)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "tenfold.integrations.vllm", raising=False)
    import tenfold.integrations.vllm as plugin

    plugin.register()
    assert registered == {"tenfold": plugin.TenfoldVllmConfig}
    yield plugin
    sys.modules.pop("tenfold.integrations.vllm", None)


def compressed(*rules):
    """Return a compressed toy and its ``quantization_config`` as a file has it."""
    model = toys.build("llama")
    replace(model, make_plan(model, load_recipe({"replace": list(rules)})))
    return model, model.config.quantization_config.to_dict()


@pytest.mark.parametrize("kind", ["low_rank", "kronecker", "tensor_train"])
def test_layers_that_vllm_fuses_give_the_outputs_of_their_parts(vllm, kind):
    rule = {"role": ["attn.q", "attn.v", "mlp.gate", "mlp.in", "mlp.out"], "structure": {"kind": kind}, "keep": 0.5}
    model, config = compressed(rule)
    settings, x = vllm.TenfoldVllmConfig.from_config(config), torch.randn(3, 32)
    sites = {site.path: site for site in find_sites(model)}
    for prefix, inner in (
        ("self_attn.qkv_proj", 32),
        ("mlp.gate_up_proj", 32),
        ("self_attn.o_proj", 32),
        ("mlp.down_proj", 48),
    ):
        parent, name = f"model.layers.1.{prefix}".rsplit(".", 1)
        paths = [f"{parent}.{part}" for part in PACKED.get(name, [name])]
        layer = Linear(inner, [sites[path].shape[0] for path in paths], settings, f"{parent}.{name}")
        if name == "o_proj":
            assert isinstance(layer.method, Plain)
            continue
        for path in paths:
            module = model.get_submodule(path)
            for factor, value in module.state_dict().items():
                layer.load(factor, value, SHARD_OF.get(path.rpartition(".")[2]) if len(paths) > 1 else None)
        layer.method.process_weights_after_loading(layer)
        x = torch.randn(3, inner)
        expected = torch.cat([x @ weight_of(model.get_submodule(path)).T for path in paths], -1)
        torch.testing.assert_close(layer(x), expected, atol=1e-5, rtol=1e-5)


def test_what_vllm_cannot_hold_is_refused(vllm):
    _, config = compressed({"role": "embed", "structure": {"kind": "low_rank", "rank": 4}})
    with pytest.raises(ValueError, match=r"embed_tokens is factorised and no linear layer .*remote-code"):
        vllm.TenfoldVllmConfig(config).get_quant_method(nn.Embedding(3, 3), "model.embed_tokens")
    share = {"role": "attn.q", "structure": {"kind": "low_rank", "rank": 4}, "share": {"factors": ["right"]}}
    with pytest.raises(ValueError, match="shares factors with other layers"):
        vllm.TenfoldVllmConfig(compressed(share)[1])
    method = vllm.TenfoldLinearMethod({None: LowRank(out_features=8, in_features=8, rank=2)})
    with pytest.raises(ValueError, match="tensor_parallel_size to 1"):
        method.create_weights(nn.Module(), 4, [8], 8, 8, torch.float32)


def test_a_missing_factor_is_named(vllm):
    structure = Structure.from_json({"kind": "low_rank", "out_features": 8, "in_features": 8, "rank": 2})
    method, layer = vllm.TenfoldLinearMethod({None: structure}), nn.Module()
    method.create_weights(layer, 8, [8], 8, 8, torch.float32)
    layer.left.weight_loader(layer.left, torch.zeros(8, 2))
    with pytest.raises(ValueError, match="lacks right of part None"):
        method.process_weights_after_loading(layer)


def test_the_package_names_its_entry_point():
    (found,) = entry_points(group="vllm.general_plugins", name="tenfold")
    assert found.value == "tenfold.integrations.vllm:register"
