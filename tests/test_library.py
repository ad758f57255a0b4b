"""Adapters switched off and on, taken off, and several of them on one backbone."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ssmlora_dist import (
    AdapterConfig,
    add_adapters,
    disabled_adapters,
    load_adapter,
    remove_adapters,
    save_adapter,
    set_adapter,
    trainable_parameters,
)
from ssmlora_dist.adapters.injection import adapter_parameters
from ssmlora_dist.errors import AdapterError, ModelError
from ssmlora_dist.models.loss import checkpoint_layers
from tests.tiny import (
    QV_AND_MLP,
    adapted_model,
    dropout_seeds,
    layers_of,
    randomize_adapters,
    tiny_model,
    token_ids,
)

NUM_LAYERS = 3
TIMEOUT_SECONDS = 60
TOKENS = token_ids(2, 9)
SEEDS = dropout_seeds([3, 4], TOKENS.shape[1])
LORA = AdapterConfig(rank=2, method="lora", alternate=(), every_layer=("k_proj", "v_proj"), dropout=0.3)
# One axis and another rank.
GATED = AdapterConfig(rank=3, method="gated", alternate=("up_proj",), dropout=0.2)
CONFIGS = {"ssmlora": QV_AND_MLP.model_copy(update={"dropout": 0.3}), "gated": GATED, "lora": LORA}
configs = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
storages = pytest.mark.parametrize("storage", ["none", "nf4"])


def adapted(config: AdapterConfig = QV_AND_MLP, storage: str = "none") -> Any:
    return adapted_model(config=config, quantization=storage, num_layers=NUM_LAYERS)


def base(storage: str = "none") -> Any:
    return tiny_model(quantization=storage, num_layers=NUM_LAYERS).eval()


@torch.no_grad()
def outputs(model: Any, tokens: Tensor = TOKENS) -> list[Tensor]:
    """Logits, and the hidden states between the layers."""
    found = model(tokens, use_cache=False, output_hidden_states=True)
    return [found.logits, *found.hidden_states]


def assert_equal(got: list[Tensor], wanted: list[Tensor]) -> None:
    different = [i for i, (a, b) in enumerate(zip(got, wanted, strict=True)) if not torch.equal(a, b)]
    assert different == [], f"not the same bit for bit: {different}"


def is_other(got: list[Tensor], than: list[Tensor]) -> bool:
    return not torch.equal(got[0], than[0])


class TestDisabled:
    @storages
    @configs
    def test_the_model_computes_as_the_base_model(self, config: AdapterConfig, storage: str) -> None:
        model, expected = adapted(config, storage), outputs(base(storage))
        adapted_outputs = outputs(model)
        assert is_other(adapted_outputs, expected)
        with disabled_adapters(model):
            assert_equal(outputs(model), expected)
        assert_equal(outputs(model), adapted_outputs)

    @configs
    def test_nothing_is_drawn(self, config: AdapterConfig) -> None:
        """Whoever trains the base model of one pass goes on with the same random numbers."""
        model = adapted(config).train()
        before = torch.get_rng_state()
        with disabled_adapters(model):
            assert_equal(outputs(model), outputs(base()))
        assert torch.equal(torch.get_rng_state(), before)

    def test_in_itself_and_left_by_an_error(self) -> None:
        model, expected = adapted(), outputs(base())
        with disabled_adapters(model):
            with pytest.raises(KeyError), disabled_adapters(model):
                raise KeyError
            assert_equal(outputs(model), expected)
        assert is_other(outputs(model), expected)

    def test_other_models_keep_their_adapters(self) -> None:
        one, other = adapted(), adapted(LORA)
        expected = outputs(other)
        with disabled_adapters(one):
            assert_equal(outputs(other), expected)
            with disabled_adapters(other):
                assert_equal(outputs(other), outputs(base()))
                assert_equal(outputs(one), outputs(base()))

    @configs
    def test_a_projection_called_by_itself(self, config: AdapterConfig) -> None:
        model = adapted(config)
        path = min(adapter_parameters(model)).partition(".lora")[0]
        module = model.get_submodule(path)
        x = torch.randn(1, 3, module.in_features)
        with disabled_adapters(model):
            assert torch.equal(module(x), module.base_layer(x))

    @configs
    def test_generation(self, config: AdapterConfig) -> None:
        model = adapted(config)
        settings: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False}
        with disabled_adapters(model):
            assert torch.equal(model.generate(TOKENS, **settings), base().generate(TOKENS, **settings))

    @configs
    @pytest.mark.parametrize("elsewhere", [False, True], ids=["here", "in_another_thread"])
    @pytest.mark.parametrize("disabled", [False, True])
    def test_a_recompute_is_as_its_forward_pass(
        self, config: AdapterConfig, disabled: bool, elsewhere: bool
    ) -> None:
        """Wherever the backward pass runs: CUDA's has threads of its own."""
        model = adapted(config).train()

        def gradients(checkpointing: bool) -> list[Tensor]:
            embedded = model.get_input_embeddings()(TOKENS).detach().requires_grad_()
            with disabled_adapters(model) if disabled else disabled_adapters(adapted()):
                loss = (
                    model(
                        inputs_embeds=embedded,
                        use_cache=False,
                        dropout_seeds=SEEDS,
                    )
                    .logits.square()
                    .mean()
                )
            wanted = [embedded, *([] if disabled else adapter_parameters(model).values())]

            def backward() -> tuple[Tensor, ...]:
                # The other way round than the forward pass.
                with disabled_adapters(adapted()) if disabled else disabled_adapters(model):
                    return torch.autograd.grad(loss, wanted)

            if not checkpointing or not elsewhere:
                return [loss.detach(), *backward()]
            with ThreadPoolExecutor(1) as pool:
                return [loss.detach(), *pool.submit(backward).result()]

        expected = gradients(False)
        checkpoint_layers(model)
        assert_equal(gradients(True), expected)

    @pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")
    def test_reentrant_checkpointing_is_the_base_models_affair(self) -> None:
        model = adapted().train()
        model.activation_checkpointing_enable({"use_reentrant": True})
        with pytest.raises(AdapterError, match="reentrant"):
            outputs(model)
        with disabled_adapters(model):
            assert_equal(outputs(model), outputs(base()))

    @configs
    def test_a_compiled_model_is_one_graph_for_each(self, config: AdapterConfig) -> None:
        model = adapted(config)
        graphs: list[Any] = []

        def count(graph: Any, _: Any) -> Any:
            graphs.append(graph)
            return graph

        torch.compiler.reset()
        compiled = torch.compile(model, backend=count, fullgraph=True)
        expected = outputs(model)
        for _ in range(2):
            assert_equal(outputs(compiled), expected)
            with disabled_adapters(model):
                assert_equal(outputs(compiled), outputs(base()))
        torch.compiler.reset()
        assert len(graphs) == 2

    def test_a_model_within_another(self) -> None:
        model = adapted()
        with disabled_adapters(torch.nn.Sequential(model)):
            assert_equal(outputs(model), outputs(base()))

    def test_a_model_without_adapters_is_refused(self) -> None:
        with (
            pytest.raises(AdapterError, match="carries no adapter; call add_adapters"),
            disabled_adapters(base()),
        ):
            pass


@configs
def test_eight_threads_of_sixty_calls_each(config: AdapterConfig) -> None:
    """I13, with the adapters disabled in every other call of every other thread."""
    num_threads, num_calls = 8, 60
    model = adapted(config)
    batches = [token_ids(1 + i % 3, 3 + i, seed=i) for i in range(num_threads)]
    wanted = [[outputs(which, tokens)[0] for tokens in batches] for which in (model, base())]
    barrier = threading.Barrier(num_threads, timeout=TIMEOUT_SECONDS)

    def wrong(index: int) -> list[int]:
        found = []
        barrier.wait()
        for call in range(num_calls):
            if disabled := index % 2 == 1 and call % 2 == 1:
                with disabled_adapters(model):
                    got = outputs(model, batches[index])[0]
            else:
                got = outputs(model, batches[index])[0]
            if not torch.equal(got, wanted[disabled][index]):
                found.append(call)
        return found

    with ThreadPoolExecutor(num_threads) as pool:
        assert list(pool.map(wrong, range(num_threads))) == [[]] * num_threads


class TestRemoved:
    @storages
    @configs
    def test_the_base_model_is_back(self, config: AdapterConfig, storage: str) -> None:
        model, untouched = base(storage), base(storage)
        expected = outputs(untouched)
        modules = dict(model.named_modules())
        add_adapters(model, config)
        randomize_adapters(model)
        outputs(model)
        assert remove_adapters(model) is model
        assert dict(model.named_modules()) == modules
        for (name, got), wanted in zip(model.named_modules(), untouched.modules(), strict=True):
            assert type(got) is type(wanted), name
            assert vars(got).keys() == vars(wanted).keys(), name
        assert list(model.state_dict()) == list(untouched.state_dict())
        assert_equal(outputs(model), expected)

    def test_it_is_saved_as_before(self, tmp_path: Path) -> None:
        base().save_pretrained(tmp_path / "before")
        remove_adapters(adapted()).save_pretrained(tmp_path / "after")
        before, after = (
            {file.name: file.read_bytes() for file in (tmp_path / name).iterdir()}
            for name in ("before", "after")
        )
        assert after == before

    @configs
    def test_adapters_are_added_anew(self, config: AdapterConfig) -> None:
        model = add_adapters(remove_adapters(adapted()), config)
        assert_equal(outputs(model), outputs(base()))
        randomize_adapters(model)
        assert_equal(outputs(model), outputs(adapted(config)))

    def test_it_can_be_trained_in_full(self) -> None:
        model = remove_adapters(adapted()).requires_grad_(True)
        model(TOKENS, use_cache=False).logits.square().mean().backward()
        assert all(parameter.grad is not None for parameter in model.parameters())

    def test_what_has_no_adapters_is_refused(self) -> None:
        with pytest.raises(AdapterError, match="carries no adapter, so there is none to remove"):
            remove_adapters(base())
        with pytest.raises(ModelError, match="with nothing around it"):
            remove_adapters(torch.nn.Sequential(adapted()))  # type: ignore[arg-type]

    def test_a_class_that_was_changed_since_is_refused(self) -> None:
        """As `fully_shard` changes it."""
        model = adapted()
        layer = layers_of(model)[0]
        layer.__class__ = type("Sharded", (type(layer),), {})
        with pytest.raises(AdapterError, match=r"class of a Sharded was changed.*before that"):
            remove_adapters(model)
        assert outputs(model)


class TestNamed:
    def model(self, storage: str = "none") -> Any:
        """Three adapters, each with other axes and another rank."""
        model = base(storage)
        for seed, (name, config) in enumerate(CONFIGS.items()):
            add_adapters(model, config, name=name)
            randomize_adapters(model, seed)
        return model

    def alone(self, name: str, storage: str = "none") -> Any:
        model = add_adapters(base(storage), CONFIGS[name])
        randomize_adapters(model, list(CONFIGS).index(name))
        return model

    @storages
    def test_each_computes_and_is_trained_as_if_alone(self, storage: str) -> None:
        model = self.model(storage)

        def results(model: Any) -> list[Tensor]:
            tensors = outputs(model.eval())
            loss = model.train()(TOKENS, use_cache=False, dropout_seeds=SEEDS).logits
            trained = [p for p in model.parameters() if p.requires_grad]
            return [*tensors, *torch.autograd.grad(loss.square().mean(), trained)]

        for name in (*reversed(CONFIGS), *CONFIGS):
            assert set_adapter(model, name) is model
            alone = self.alone(name, storage)
            assert_equal(results(model), results(alone))
            assert model.ssmlora_config == alone.ssmlora_config
            assert [name for name, _ in model.named_parameters()] == [
                name for name, _ in alone.named_parameters()
            ]
            assert list(model.state_dict()) == list(alone.state_dict())
            with disabled_adapters(model):
                assert_equal(outputs(model.eval()), outputs(base(storage)))

    def test_files_are_those_of_one_alone(self, tmp_path: Path) -> None:
        model = self.model()
        for name in CONFIGS:
            save_adapter(model, tmp_path / "several" / name, name=name)
            save_adapter(self.alone(name), tmp_path / "alone" / name)
            for file in (tmp_path / "alone" / name).iterdir():
                assert (tmp_path / "several" / name / file.name).read_bytes() == file.read_bytes()
        save_adapter(model, tmp_path / "active")
        model.save_pretrained(tmp_path / "pretrained")
        for place in ("active", "pretrained"):
            for file in (tmp_path / "several" / "lora").iterdir():
                assert (tmp_path / place / file.name).read_bytes() == file.read_bytes()

    def test_loading_under_names(self, tmp_path: Path) -> None:
        model = base()
        for name in CONFIGS:
            save_adapter(self.alone(name), tmp_path / name)
            load_adapter(model, tmp_path / name, name=name)
            assert_equal(outputs(model), outputs(self.alone(name)))
        # Without a name it is the active one whose values are replaced.
        randomize_adapters(model, seed=9)
        load_adapter(model, tmp_path / "lora")
        assert_equal(outputs(model), outputs(self.alone("lora")))
        # Under the name of another one, that becomes active.
        set_adapter(model, "gated")
        randomize_adapters(model, seed=9)
        set_adapter(model, "lora")
        load_adapter(model, tmp_path / "gated", name="gated")
        assert_equal(outputs(model), outputs(self.alone("gated")))

    def test_parameters_are_the_same_objects_when_it_comes_back(self) -> None:
        model = self.model()
        before = adapter_parameters(model)
        set_adapter(model, "ssmlora")
        assert not {id(p) for p in model.parameters()} & {id(p) for p in before.values()}
        set_adapter(model, "lora")
        assert {n: id(p) for n, p in adapter_parameters(model).items()} == {
            n: id(p) for n, p in before.items()
        }

    def test_the_mode_is_the_models(self) -> None:
        model = self.model().train()
        set_adapter(model, "ssmlora")
        assert all(module.training for module in model.modules())
        set_adapter(model.eval(), "lora")
        assert not any(module.training for module in model.modules())

    def test_the_device_is_the_models(self) -> None:
        model = set_adapter(self.model().to("meta"), "ssmlora")
        assert all(parameter.is_meta for parameter in model.parameters())

    @pytest.mark.parametrize("way", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
    def test_copies_have_adapters_of_their_own(self, way: Callable[[Any], Any]) -> None:
        model = self.model()
        copied = way(model)
        set_adapter(model, "ssmlora")
        set_adapter(copied, "ssmlora")
        assert_equal(outputs(copied), outputs(model))
        assert not {id(p) for p in copied.parameters()} & {id(p) for p in model.parameters()}
        before = outputs(model)
        randomize_adapters(copied, seed=9)
        assert_equal(outputs(model), before)

    def test_switching_in_the_body_of_disabled_adapters(self) -> None:
        model = self.model()
        with disabled_adapters(model):
            set_adapter(model, "ssmlora")
            assert_equal(outputs(model), outputs(base()))
        assert_equal(outputs(model), outputs(self.alone("ssmlora")))

    def test_all_are_removed(self) -> None:
        model = remove_adapters(self.model())
        assert vars(model).keys() == vars(base()).keys()
        assert_equal(outputs(model), outputs(base()))

    def test_unknown_names_are_refused_with_the_nearest(self, tmp_path: Path) -> None:
        model = self.model()
        message = r"no adapter named 'gate' \(nearest: gated\); it has 'lora', 'ssmlora', 'gated'"
        with pytest.raises(AdapterError, match=message):
            set_adapter(model, "gate")
        with pytest.raises(AdapterError, match=message):
            save_adapter(model, tmp_path / "adapter", name="gate")
        assert not (tmp_path / "adapter").exists()
        with pytest.raises(AdapterError, match="carries no adapter; call add_adapters first"):
            set_adapter(base(), "default")

    def test_what_cannot_be_added_leaves_the_active_one(self, tmp_path: Path) -> None:
        model = self.model()
        expected = outputs(model)
        with pytest.raises(AdapterError, match="named 'gated' already; give this one another `name`"):
            add_adapters(model, GATED, name="gated")
        with pytest.raises(AdapterError, match="q_prof"):
            add_adapters(model, AdapterConfig(alternate=("q_prof",)), name="fourth")
        save_adapter(adapted_model(num_layers=NUM_LAYERS + 1), tmp_path)
        with pytest.raises(AdapterError, match="which the model has no adapter for"):
            load_adapter(model, tmp_path, name="fourth")
        assert_equal(outputs(model), expected)
        with pytest.raises(AdapterError, match=r"it has 'lora', 'ssmlora', 'gated'$"):
            set_adapter(model, "fourth")

    def test_a_model_whose_adapter_cannot_be_loaded_stays_the_base_model(self, tmp_path: Path) -> None:
        save_adapter(adapted_model(num_layers=NUM_LAYERS + 1), tmp_path)
        model = base()
        with pytest.raises(AdapterError, match="which the model has no adapter for"):
            load_adapter(model, tmp_path)
        assert type(model) is type(base())
        add_adapters(model)


@pytest.mark.parametrize(
    "method",
    [
        lambda model: model.disable_adapters(),
        lambda model: model.enable_adapters(),
        lambda model: model.active_adapters(),
        lambda model: model.set_adapter("default"),
        lambda model: model.load_adapter("somewhere"),
        lambda model: model.delete_adapter("default"),
    ],
)
def test_methods_that_know_adapters_of_peft_alone_are_refused(method: Callable[[Any], Any]) -> None:
    model = adapted()
    with pytest.raises(AdapterError, match="is for adapters of PEFT; use disabled_adapters, set_adapter"):
        method(model)
    assert_equal(outputs(model), outputs(adapted()))


class TestTrainableParameters:
    @pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # PEFT's own use
    @storages
    def test_counts_are_those_of_peft(self, storage: str) -> None:
        """Packed in 4 bits as well, where PEFT's count goes by the bytes of a storage dtype."""
        peft = pytest.importorskip("peft")
        config = peft.LoraConfig(r=2, target_modules=["k_proj", "v_proj"])
        expected = peft.get_peft_model(base(), config).get_nb_trainable_parameters()
        counted = trainable_parameters(add_adapters(base(storage), LORA))
        assert (counted.trainable, counted.total) == expected

    def test_names_and_text(self) -> None:
        model = TestNamed().model()
        counted = trainable_parameters(model)
        assert counted.by_name == {n: p.numel() for n, p in adapter_parameters(model).items()}
        share = 100 * counted.trainable / counted.total
        assert str(counted) == (
            f"trainable params: {counted.trainable} || all params: {counted.total:,} || "
            f"trainable%: {share:.4f}"
        )

    def test_quantised_experts_count_by_the_numbers_that_they_stand_for(self) -> None:
        settings: dict[str, Any] = {"num_layers": 2, "num_local_experts": 3, "num_experts_per_tok": 2}
        dense, packed = (tiny_model("mixtral", quantization=kind, **settings) for kind in ("none", "nf4"))
        assert trainable_parameters(packed).total == sum(p.numel() for p in dense.parameters())
