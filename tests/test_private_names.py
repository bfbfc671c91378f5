"""Each private name that opticnerve uses still does what it is used for, and none is used elsewhere."""

from __future__ import annotations

import ast
import builtins
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, flop_registry
from transformers import (
    AttentionInterface,
    AutoProcessor,
    CompileConfig,
    LlamaConfig,
    MambaConfig,
    MambaForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from transformers.image_processing_backends import TorchvisionBackend
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import tiny
from opticnerve.common import private_names
from opticnerve.models.vlm.build import Dock
from opticnerve.models.vlm.processing import OpticNerveProcessor
from opticnerve.models.vlm.tiling import TilingImageProcessor

SOURCE = Path(__file__).parents[1] / "src"
HOME = SOURCE / "opticnerve" / "common" / "private_names.py"
IDS = torch.tensor([[1, 5, 7, 9]])


@pytest.fixture
def llama() -> Any:
    return tiny.language_model("llama", 300).eval()


# -- none elsewhere ---------------------------------------------------------------------------------------------------


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.endswith("__") and name != "_"


def own_names(trees: list[ast.Module]) -> set[str]:
    """What our classes and modules define themselves."""
    found = set()
    for node in (n for tree in trees for n in ast.walk(tree)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.Attribute) and ast.unparse(node) in (f"self.{node.attr}", f"cls.{node.attr}"):
            found |= {node.attr} if isinstance(node.ctx, ast.Store) else set()
    return found


def private_uses(tree: ast.Module, own: set[str]) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr) and node.attr not in own:
            yield f"line {node.lineno}: {ast.unparse(node)}"
        elif isinstance(node, ast.Import | ast.ImportFrom):
            parts = [p for a in node.names for p in a.name.split(".")] + (getattr(node, "module", "") or "").split(".")
            if any(map(is_private, parts)):
                yield f"line {node.lineno}: {ast.unparse(node)}"
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "hasattr", "setattr"):
            told = node.args[1] if len(node.args) > 1 else None
            if isinstance(told, ast.Constant) and is_private(str(told.value)) and told.value not in own:
                yield f"line {node.lineno}: {ast.unparse(node)}"


def test_private_names_stand_in_one_file() -> None:
    files = sorted(SOURCE.rglob("*.py"))
    trees = {f: ast.parse(f.read_text(encoding="utf-8")) for f in files}
    own = own_names(list(trees.values())) - set(dir(builtins))
    found = [
        f"{file.relative_to(SOURCE)}, {use}"
        for file, tree in trees.items()
        if file != HOME and "vllm_plugin" not in file.parts  # vLLM's hooks are its interface for plugins
        for use in private_uses(tree, own)
        if not use.endswith("os._exit")  # Python's own, and documented
    ]
    assert not found, "\n".join(found)


def test_the_search_finds_them() -> None:
    tree = ast.parse(
        "import torch._dynamo\nfrom torch._subclasses import x\nmodel.config._attn_implementation = 1\n"
        "getattr(layer, '_compiled_call_impl', None)\nself._mine()\n"
    )
    assert len(list(private_uses(tree, {"_mine"}))) == 4


# -- transformers -----------------------------------------------------------------------------------------------------


def test_the_cache_goes_in_and_comes_out_by_one_name(llama: Any, docked: Callable[..., Dock]) -> None:
    for model in (llama, docked().model):
        first = model(IDS[:, :3], use_cache=True)
        whole = model(IDS).logits[:, -1]
        again = model(IDS[:, 3:], **{private_names.CACHE: first[private_names.CACHE]}).logits[:, -1]
        torch.testing.assert_close(again, whole)
    ours = docked().model
    for name in ("cache", "past_key_values"):  # both, whatever transformers calls it
        cache = ours(IDS[:, :3], use_cache=True)[private_names.CACHE]
        torch.testing.assert_close(ours(IDS[:, 3:], **{name: cache}).logits[:, -1], ours(IDS).logits[:, -1])
    with pytest.raises(ValueError, match="give one of"):
        ours(IDS, cache=cache, past_key_values=cache)


def test_attention_is_chosen_by_the_configuration(llama: Any) -> None:
    calls = []

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return sdpa_attention_forward(*args, **kwargs)

    assert private_names.attention_of(llama.config) == "sdpa"
    assert private_names.offers_attention(llama)
    AttentionInterface.register("counted", counted)
    private_names.set_attention(llama.config, "counted")
    llama(IDS)
    assert len(calls) == llama.config.num_hidden_layers
    private_names.set_attention(llama.config, "sdpa")
    llama(IDS)
    assert len(calls) == llama.config.num_hidden_layers


def test_experts_compute_as_is_said() -> None:
    small = Qwen3MoeConfig(  # type: ignore[call-arg]
        hidden_size=16, num_hidden_layers=1, vocab_size=32, num_attention_heads=2, num_key_value_heads=2, head_dim=8,
        num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8,
    )  # fmt: skip
    mixture = Qwen3MoeForCausalLM(small)
    counted = {private_names.grouped_product(): lambda *shapes, **_: 1}
    for name, products in (("eager", 0), ("grouped_mm", 2)):
        private_names.set_experts(mixture.config, name)
        assert private_names.experts_of(mixture.config) == name
        with FlopCounterMode(display=False, custom_mapping=counted) as counter:
            mixture(IDS)
        assert counter.get_flop_counts()["Global"].get(private_names.grouped_product(), 0) == products


def test_recurrent_models_say_so(llama: Any) -> None:
    small = MambaConfig(hidden_size=16, num_hidden_layers=1, vocab_size=32, state_size=4)
    assert private_names.is_stateful(MambaForCausalLM(small))
    assert not private_names.is_stateful(llama)


def test_layers_that_stay_whole_are_handed_on(llama: Any, docked: Callable[..., Dock]) -> None:
    assert private_names.layers_not_to_split(llama) == ["LlamaDecoderLayer"]
    assert private_names.layers_not_to_split(docked().model) == ["LlamaDecoderLayer"]


def test_layers_are_computed_again_in_a_context_of_ours(llama: Any) -> None:
    entered = []

    def contexts() -> Any:
        entered.append(1)
        return torch.autograd.profiler.record_function("a"), torch.autograd.profiler.record_function("b")

    private_names.checkpoint_layers(llama.train(), contexts)
    llama(IDS).logits.sum().backward()
    assert len(entered) == llama.config.num_hidden_layers
    private_names.keep_activations(llama)
    llama(IDS).logits.sum().backward()
    assert len(entered) == llama.config.num_hidden_layers


def test_scores_change_as_in_generate(llama: Any) -> None:
    config = private_names.generation_config(llama, max_new_tokens=3, do_sample=True, temperature=0.5, top_k=0)
    assert (config.max_new_tokens, config.temperature) == (3, 0.5)
    scores = torch.randn(1, 300)
    torch.testing.assert_close(private_names.generation_rules(llama, config, IDS)(IDS, scores), scores / 0.5)
    greedy = private_names.generation_config(llama, max_new_tokens=3, do_sample=False)
    assert not private_names.generation_rules(llama, greedy, IDS)


def test_rows_are_repeated(llama: Any, docked: Callable[..., Dock]) -> None:
    ids, inputs = private_names.repeat_rows(llama, 3, IDS, {"attention_mask": torch.ones_like(IDS)})
    assert ids.tolist() == IDS.tolist() * 3
    assert len(inputs["attention_mask"]) == 3


def test_compiling_on_a_cpu() -> None:
    config = CompileConfig()
    known = vars(type(config)) | vars(config)
    assert "_compile_all_devices" in known, "transformers asks for another attribute now: see generate's auto-compile"
    private_names.compile_on_any_device(config)


def test_a_configuration_forgets_its_place() -> None:
    config = LlamaConfig()
    config.name_or_path = "/somewhere"
    private_names.forget_where_from(config)
    assert config.name_or_path == ""
    assert "somewhere" not in config.to_json_string(use_diff=False)


def test_parts_of_a_saved_processor(docked: Callable[..., Dock], tmp_path: Path) -> None:
    docked().processor.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "processor_config.json").read_text())
    images, words = private_names.saved_parts(
        OpticNerveProcessor, ["image_processor", "tokenizer"], str(tmp_path), saved
    )
    assert hasattr(images, "image_mean")
    assert words.encode("a")


def test_the_steps_of_an_image_processor() -> None:
    called = []

    class Counted(TorchvisionBackend):
        def _preprocess(self, *args: Any, **kwargs: Any) -> Any:
            called.append(1)
            return super()._preprocess(*args, **kwargs)

    assert all(hasattr(TorchvisionBackend, name) for name in private_names.PREPROCESS_STEPS)
    assert private_names.preprocess_of(Counted) is not private_names.preprocess_of(TorchvisionBackend)
    kwargs: dict[str, Any] = {"do_resize": True, "size": {"height": 8, "width": 8}, "resample": 2, "do_rescale": True}
    Counted(**kwargs)(tiny.picture(), return_tensors="pt")
    assert called


# -- peft, timm, torch ------------------------------------------------------------------------------------------------


def test_renamings_are_forgotten(docked: Callable[..., Dock], tmp_path: Path) -> None:
    model = docked().model
    model.save_pretrained(tmp_path)
    file, old = tmp_path / "model.safetensors", {r"connector\.old\.": "connector.layers."}
    save_file({n.replace("connector.layers.", "connector.old."): t for n, t in load_file(file).items()}, file)
    again = type(model).from_pretrained(tmp_path, key_mapping=old)

    def patterns() -> set[str]:
        return {p for conversion in again._weight_conversions for p in conversion.source_patterns}

    assert set(old) <= patterns()
    private_names.forget_renamings(again, old)
    assert set(old).isdisjoint(patterns())


def test_a_folder_of_timms(tmp_path: Path) -> None:
    written = {
        "architecture": "test_vit", "num_classes": 0, "model_args": {"img_size": 32},
        "pretrained_cfg": {"mean": [0.1, 0.2, 0.3], "input_size": [3, 32, 32]},
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(written))
    found, architecture, model_args = private_names.read_timm_config(str(tmp_path))
    assert (architecture, model_args) == ("test_vit", {"img_size": 32})
    assert (list(found["mean"]), found["num_classes"]) == ([0.1, 0.2, 0.3], 0)


def test_writing_is_counted() -> None:
    tensor = torch.zeros(2)
    before = private_names.times_written(tensor)
    tensor.add_(1)
    assert private_names.times_written(tensor) > before
    with torch.inference_mode():
        assert private_names.times_written(torch.zeros(1)) == 0


@pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook"])
def test_hooks_are_seen_and_removed(register: str) -> None:
    ran: list[int] = []
    module = nn.Sequential(nn.Linear(2, 2))
    assert not private_names.has_hooks(module[0])
    getattr(module[0], register)(lambda *_: ran.append(1))
    assert private_names.has_hooks(module[0])
    module(torch.ones(1, 2))
    private_names.remove_hooks(module)
    module(torch.ones(1, 2))
    assert ran == [1]


def test_tables_that_no_checkpoint_holds() -> None:
    module = nn.Sequential(nn.BatchNorm1d(2))
    table = torch.ones(2)
    module[0].register_buffer("frequencies", table, persistent=False)
    assert [(m, n) for m, n, _ in private_names.computed_tables(module)] == [(module[0], "frequencies")]


def test_compiling_a_module_is_taken_back() -> None:
    class Sine(nn.Module):  # torch 2.9 compiles no module of its own alone
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.sin()

    module, ran = Sine(), []

    def backend(graph: Any, inputs: Any) -> Any:
        ran.append(1)
        return graph.forward

    module.compile(backend=backend)
    module(torch.ones(1, 2))
    private_names.undo_compile(module)
    torch.compiler.reset()
    module(torch.ones(1, 2))
    assert ran == [1]


def test_softmax_backwards() -> None:
    scores = torch.randn(3, 5, dtype=torch.double, requires_grad=True)
    grad = torch.randn(3, 5, dtype=torch.double)
    weights = scores.softmax(-1)
    weights.backward(grad)
    torch.testing.assert_close(private_names.softmax_backward(grad, weights.detach()), scores.grad)


def test_weights_as_onednn_wants_them() -> None:
    assert not private_names.can_reorder(torch.float32)
    if not private_names.can_reorder(torch.bfloat16):
        pytest.skip("oneDNN has no bf16 on this processor")
    x, weight, bias = torch.randn(32, 64).bfloat16(), torch.randn(16, 64).bfloat16(), torch.randn(16).bfloat16()
    with torch.inference_mode():
        packed = private_names.reorder_weight(weight, 32)
        out = private_names.reordered_linear(x, packed, bias)
    torch.testing.assert_close(out, F.linear(x, weight, bias), atol=0.5, rtol=0.02)


def test_all_are_copied_and_converted() -> None:
    into = [torch.zeros(2, dtype=torch.bfloat16), torch.zeros(3)]
    private_names.copy_all(into, [torch.ones(2), torch.ones(3)])
    assert all((tensor == 1).all() for tensor in into) and into[0].dtype == torch.bfloat16


def test_what_must_be_true() -> None:
    private_names.assert_on_device(torch.tensor(True), "so it is")
    with pytest.raises(RuntimeError, match="so it is"):
        private_names.assert_on_device(torch.tensor(False), "so it is")


def test_tensors_without_numbers() -> None:
    mode, outside = private_names.fake_tensors()
    with mode:
        made = torch.empty(2, device="cuda")
        assert made.device.type == "cuda"
        with outside():
            assert float(torch.ones(1)) == 1.0


def test_the_optimizer_of_zero_2() -> None:
    zero = pytest.importorskip("deepspeed.runtime.zero.stage_1_and_2", reason="deepspeed is not installed")
    assert hasattr(zero.DeepSpeedZeroOptimizer, "_lazy_init_hp_params_optimizer_state")


# -- methods of ours that transformers calls --------------------------------------------------------------------------


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Callable[[type, str], list[int]]:
    """(class, method) → a list that grows with each call."""

    def count(owner: type, name: str) -> list[int]:
        calls: list[int] = []
        before = vars(owner)[name]
        inner = before.__func__ if isinstance(before, classmethod) else before

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            calls.append(1)
            return inner(*args, **kwargs)

        monkeypatch.setattr(owner, name, classmethod(wrapped) if isinstance(before, classmethod) else wrapped)
        return calls

    return count


def test_the_processors_hooks_are_called(counted: Any, docked: Callable[..., Dock], tmp_path: Path) -> None:
    checks = counted(OpticNerveProcessor, "_check_special_mm_tokens")
    loads = counted(OpticNerveProcessor, "_get_arguments_from_pretrained")
    processor = docked().processor
    processor(images=[tiny.picture()], text="<image> a", return_tensors="pt")
    processor.save_pretrained(tmp_path)
    AutoProcessor.from_pretrained(tmp_path)
    assert checks
    assert loads


def test_the_models_hooks_are_called(counted: Any, docked: Callable[..., Dock]) -> None:
    made = docked()
    kind = type(made.model)
    draws, repeats = counted(kind.__mro__[1], "_init_weights"), counted(kind, "_expand_inputs_for_generation")
    fresh = kind(made.model.config)
    assert draws
    inputs = made.processor(images=[tiny.picture()], text="<image> a", return_tensors="pt")
    out: Tensor = fresh.generate(
        **inputs, max_new_tokens=2, num_return_sequences=2, do_sample=True, pad_token_id=0, eos_token_id=None
    )
    assert len(out) == 2
    assert repeats


def test_the_tiling_processors_step_is_called(counted: Any) -> None:
    steps = counted(TilingImageProcessor, "_preprocess")
    side = {"height": 16, "width": 16}
    made = TilingImageProcessor(image_grid_pinpoints=[[32, 32]], size=side, crop_size=side, thumbnail=True)  # type: ignore[call-arg]
    out = made([tiny.picture()], return_tensors="pt")
    assert steps
    assert out["pixel_values"].shape == (5, 3, 16, 16)


def test_a_models_supports_are_read(docked: Callable[..., Dock]) -> None:
    model = docked().model
    for name in ("eager", "sdpa"):
        model.set_attn_implementation(name)
        assert private_names.attention_of(model.language_model.config) == name


def test_each_operation_is_seen_and_has_the_name_by_which_torch_counts_it() -> None:
    seen: list[Any] = []
    with private_names.operations(lambda operation, args, kwargs, out: seen.append((operation, out))):
        weight = torch.ones(2, 3, device="meta", requires_grad=True)
        (torch.ones(4, 2, device="meta") @ weight).sum().backward()
    products = [out for operation, out in seen if operation is torch.ops.aten.mm]
    assert [tuple(out.shape) for out in products] == [(4, 3), (2, 3)]
    assert torch.ops.aten.mm in flop_registry
    assert private_names.tensors_in([weight, {"a": (weight, 1)}])[1] is weight
