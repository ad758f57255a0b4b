"""Sizes of a decoder, as plain numbers: counted by `models`, reckoned with by `distributed`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LayerSizes:
    """What one decoder layer holds.

    Attributes:
        linear_weights: weights of the linear layers, with which every token is multiplied.
        expert_weights: weights of all experts.
        active_expert_weights: of the experts that one token goes through.
        largest_expert_weights: of the largest tensor that holds experts.
        router_weights: with which experts are chosen for every token.
        other_weights: of norms, biases, the router and what else there is.
        last_weights: of the last linear layer, whose output nothing in the layer needs.
        attention_size: width of all query heads together; 0 without attention.
        activation_size: widths of what linear layers and experts take in and give out, the hidden states
            counted once.
        mlp_weights: of the linear layers, those in an MLP that can be computed in tiles of tokens.
        mlp_activation_size: of `activation_size`, what belongs to these.
    """

    linear_weights: int
    expert_weights: int
    active_expert_weights: int
    largest_expert_weights: int
    router_weights: int
    other_weights: int
    last_weights: int
    attention_size: int
    activation_size: int
    mlp_weights: int
    mlp_activation_size: int

    @property
    def multiplied_weights(self) -> int:
        """Weights with which one token is multiplied."""
        return self.linear_weights + self.active_expert_weights + self.router_weights


@dataclass(frozen=True)
class DecoderShape:
    """Sizes of a decoder.

    Attributes:
        hidden_size: D.
        vocab_size: tokens of the embedding, which are those of the head.
        tied_embeddings: whether the output head is the embedding's matrix; two stages hold a copy each.
        layers: of each decoder layer.
    """

    hidden_size: int
    vocab_size: int
    tied_embeddings: bool
    layers: tuple[LayerSizes, ...]

    @property
    def num_layers(self) -> int:
        """Number of decoder layers."""
        return len(self.layers)

    def flops_per_token(self, sequence_length: float) -> float:
        """Model FLOPs of a training step per token, forward and backward to the inputs.

        Neither recompute nor the output head counts. Frozen weights have no weight gradients, so both passes
        are 2 per weight; causal attention is 2 * 2 * S/2 per unit of width forward and twice that backward.
        """
        return sum(
            4.0 * layer.multiplied_weights + 6.0 * layer.attention_size * sequence_length
            for layer in self.layers
        )
