"""The architectures that can be compressed: every parameter of every head, read off the config alone.

Nothing here imports torch. A family lists, for a `config.json`, all parameters with their shapes and which of them are
weight matrices of a *kind*. The kinds have the same names in all families; a matrix is always seen as [out, in] (an
embedding as [tokens, width]), so GPT-2's transposed Conv1D and its fused c_attn are turned and cut here, once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any

from .errors import CompressionError, listing
from .structures import Shape

KINDS = (
    "word_embeddings",
    "query",
    "key",
    "value",
    "attention_output",
    "intermediate",
    "output",
    "position_embeddings",
    "pooler",
    "head",
)
# How names of classes end that predict masked tokens, or the next one.
MASKED_HEADS = ("ForMaskedLM", "ForPreTraining")
CAUSAL_HEADS = ("LMHeadModel", "ForCausalLM")
SHORTHANDS = {
    "attention": ("query", "key", "value", "attention_output"),
    "feed_forward": ("intermediate", "output"),
    "linears": ("query", "key", "value", "attention_output", "intermediate", "output"),
    "all": KINDS,
}


@dataclass(frozen=True)
class Matrix:
    """One weight matrix that can be compressed.

    Attributes:
        module: path of the module that holds it, without the prefix of the base model where it lies in the base.
        kind: one of `KINDS`.
        layer: index of its layer; None outside the layers.
        rows: outputs, or tokens of an embedding.
        columns: inputs, or width of an embedding.
        inputs: name of the activations it is applied to; matrices with the same inputs share their statistics.
        in_base: whether it lies in the base model (else in a head).
        embedding: whether its rows are looked up.
        bias: whether its module has a bias.
        transposed: whether the checkpoint keeps it as [in, out].
        part: of a fused module, the part that this matrix is (see `PARTS`).
        heads: attention heads that the rows are cut into; 1 where they are not.
    """

    module: str
    kind: str
    layer: int | None
    rows: int
    columns: int
    inputs: str
    in_base: bool = True
    embedding: bool = False
    bias: bool = True
    transposed: bool = False
    part: str | None = None
    heads: int = 1

    @property
    def name(self) -> str:
        """The module's path, and behind it the part; what regular expressions of a recipe are matched against."""
        return f"{self.module}.{self.part}" if self.part else self.module

    def dense(self, state: Mapping[str, Any], prefix: str) -> Any:
        """Return the matrix [rows, columns] as a view into a checkpoint's tensors."""
        weight = state[f"{prefix if self.in_base else ''}{self.module}.weight"]
        weight = weight.T if self.transposed else weight
        if self.part:
            start = PARTS.index(self.part) * self.rows
            weight = weight[start : start + self.rows]
        return weight


# The parts of a fused module, in the order of its outputs.
PARTS = ("query", "key", "value")


@dataclass
class Skeleton:
    """All parameters of a model, by name and shape, and the matrices among them.

    Attributes:
        prefix: what parameters of the base model begin with, e.g. ``"bert."``; empty for a base model.
        parameters: full name → shape of every stored parameter (tied ones once, under the input's name).
        matrices: those that belong to a kind.
        tied: whether the word embeddings also serve as the head's output matrix.
        word_embeddings: module of the word embeddings, without the prefix.
    """

    prefix: str
    word_embeddings: str
    tied: bool = False
    parameters: dict[str, Shape] = field(default_factory=dict)
    matrices: list[Matrix] = field(default_factory=list)

    def linear(
        self,
        module: str,
        rows: int,
        columns: int,
        kind: str | None = None,
        *,
        layer: int | None = None,
        inputs: str | None = None,
        bias: bool = True,
        transposed: bool = False,
        fused: bool = False,
        in_base: bool = True,
        heads: int = 1,
    ) -> None:
        """Add a linear layer [rows, columns]; `fused` cuts it into `PARTS` of equal rows, each a matrix of its own."""
        full = f"{self.prefix if in_base else ''}{module}"
        self.parameters[f"{full}.weight"] = (columns, rows) if transposed else (rows, columns)
        if bias:
            self.parameters[f"{full}.bias"] = (rows,)
        if kind is None:
            return
        for part in PARTS if fused else (None,):
            self.matrices.append(
                Matrix(
                    module=module,
                    kind=part or kind,
                    layer=layer,
                    rows=rows // len(PARTS) if part else rows,
                    columns=columns,
                    inputs=inputs or module,
                    in_base=in_base,
                    bias=bias,
                    transposed=transposed,
                    part=part,
                    heads=heads,
                )
            )

    def embedding(self, module: str, rows: int, columns: int, kind: str | None = None) -> None:
        """Add an embedding [rows, columns]."""
        self.parameters[f"{self.prefix}{module}.weight"] = (rows, columns)
        if kind:
            self.matrices.append(Matrix(module, kind, None, rows, columns, inputs=module, embedding=True, bias=False))

    def norm(self, module: str, width: int, *, in_base: bool = True) -> None:
        """Add a layer norm."""
        full = f"{self.prefix if in_base else ''}{module}"
        self.parameters |= {f"{full}.weight": (width,), f"{full}.bias": (width,)}

    def output_embeddings(self, module: str, vocabulary: int, width: int, *, bias: str | None, tied: bool) -> None:
        """Add a language model's output matrix, unless it is `tied` to the word embeddings; `bias` names its bias."""
        self.tied = tied
        if bias:
            self.parameters[bias] = (vocabulary,)
        if not tied:
            self.linear(module, vocabulary, width, "head", bias=bias is not None, in_base=False)

    @property
    def total(self) -> int:
        """Number of parameters, each stored once."""
        return sum(prod(shape) for shape in self.parameters.values())


@dataclass(frozen=True)
class Family:
    """An architecture: its config, its classes, and how its skeleton is built."""

    model_type: str
    title: str
    base_class: str
    base_prefix: str
    heads: tuple[str, ...]
    build: Callable[[Mapping[str, Any], str, Skeleton], None]
    word_embeddings: str
    defaults: Mapping[str, Any]

    def skeleton(self, config: Mapping[str, Any], architecture: str) -> Skeleton:
        """Return the parameters of `architecture` (a stock class name) under `config` (the contents of config.json).

        Raises:
            CompressionError: the architecture is not one of this family's, or the config lacks a size.
        """
        if architecture not in self.heads:
            raise CompressionError(
                f"'{architecture}' is not an architecture of {self.title} that can be compressed; "
                f"known: {listing(self.heads)}. Pass auto_class to choose one."
            )
        prefix = "" if architecture == self.base_class else f"{self.base_prefix}."
        skeleton = Skeleton(prefix, self.word_embeddings)
        values = {**self.defaults, **{name: value for name, value in config.items() if value is not None}}
        values["num_labels"] = len(values["id2label"]) if "id2label" in values else values.get("num_labels", 2)
        self.build(values, architecture, skeleton)
        return skeleton


def _encoder(c: Mapping[str, Any], skeleton: Skeleton, *, pooler: bool) -> None:
    """Add the body that BERT and RoBERTa have in common."""
    width, inner = c["hidden_size"], c["intermediate_size"]
    skeleton.embedding("embeddings.word_embeddings", c["vocab_size"], width, "word_embeddings")
    skeleton.embedding("embeddings.position_embeddings", c["max_position_embeddings"], width, "position_embeddings")
    skeleton.embedding("embeddings.token_type_embeddings", c["type_vocab_size"], width)
    skeleton.norm("embeddings.LayerNorm", width)
    for i in range(c["num_hidden_layers"]):
        at = f"encoder.layer.{i}"
        for kind in PARTS:
            skeleton.linear(
                f"{at}.attention.self.{kind}",
                width,
                width,
                kind,
                layer=i,
                inputs=f"{at}.attention.self",
                heads=c["num_attention_heads"],
            )
        skeleton.linear(f"{at}.attention.output.dense", width, width, "attention_output", layer=i)
        skeleton.norm(f"{at}.attention.output.LayerNorm", width)
        if c["is_decoder"] and c["add_cross_attention"]:
            for kind in PARTS:
                skeleton.linear(f"{at}.crossattention.self.{kind}", width, width)
            skeleton.linear(f"{at}.crossattention.output.dense", width, width)
            skeleton.norm(f"{at}.crossattention.output.LayerNorm", width)
        skeleton.linear(f"{at}.intermediate.dense", inner, width, "intermediate", layer=i)
        skeleton.linear(f"{at}.output.dense", width, inner, "output", layer=i)
        skeleton.norm(f"{at}.output.LayerNorm", width)
    if pooler:
        skeleton.linear("pooler.dense", width, width, "pooler")


def _head(skeleton: Skeleton, module: str, rows: int, columns: int, *, bias: bool = True) -> None:
    skeleton.linear(module, rows, columns, "head", bias=bias, in_base=False)


def _bert(c: Mapping[str, Any], architecture: str, skeleton: Skeleton) -> None:
    width, head = c["hidden_size"], architecture.removeprefix("Bert")
    poolers = ("Model", "ForPreTraining", "ForNextSentencePrediction", "ForSequenceClassification", "ForMultipleChoice")
    _encoder(c, skeleton, pooler=head in poolers)
    if head in ("ForPreTraining", "ForMaskedLM", "LMHeadModel"):
        _head(skeleton, "cls.predictions.transform.dense", width, width)
        skeleton.norm("cls.predictions.transform.LayerNorm", width, in_base=False)
        skeleton.output_embeddings(
            "cls.predictions.decoder",
            c["vocab_size"],
            width,
            bias="cls.predictions.bias",
            tied=c["tie_word_embeddings"],
        )
    if head in ("ForPreTraining", "ForNextSentencePrediction"):
        _head(skeleton, "cls.seq_relationship", 2, width)
    if head in ("ForSequenceClassification", "ForTokenClassification", "ForMultipleChoice"):
        _head(skeleton, "classifier", 1 if head == "ForMultipleChoice" else c["num_labels"], width)
    if head == "ForQuestionAnswering":
        _head(skeleton, "qa_outputs", c["num_labels"], width)


def _roberta(c: Mapping[str, Any], architecture: str, skeleton: Skeleton) -> None:
    width, head = c["hidden_size"], architecture.removeprefix("Roberta")
    _encoder(c, skeleton, pooler=head in ("Model", "ForMultipleChoice"))
    if head in ("ForMaskedLM", "ForCausalLM"):
        _head(skeleton, "lm_head.dense", width, width)
        skeleton.norm("lm_head.layer_norm", width, in_base=False)
        skeleton.output_embeddings(
            "lm_head.decoder", c["vocab_size"], width, bias="lm_head.bias", tied=c["tie_word_embeddings"]
        )
    if head == "ForSequenceClassification":
        _head(skeleton, "classifier.dense", width, width)
        _head(skeleton, "classifier.out_proj", c["num_labels"], width)
    if head in ("ForTokenClassification", "ForMultipleChoice"):
        _head(skeleton, "classifier", 1 if head == "ForMultipleChoice" else c["num_labels"], width)
    if head == "ForQuestionAnswering":
        _head(skeleton, "qa_outputs", c["num_labels"], width)


def _gpt2(c: Mapping[str, Any], architecture: str, skeleton: Skeleton) -> None:
    width, head = c["n_embd"], architecture.removeprefix("GPT2")
    inner = c.get("n_inner") or 4 * width
    skeleton.embedding("wte", c["vocab_size"], width, "word_embeddings")
    skeleton.embedding("wpe", c["n_positions"], width, "position_embeddings")
    for i in range(c["n_layer"]):
        at = f"h.{i}"
        skeleton.norm(f"{at}.ln_1", width)
        skeleton.linear(
            f"{at}.attn.c_attn",
            3 * width,
            width,
            "query",
            layer=i,
            transposed=True,
            fused=True,
            heads=c["n_head"],
        )
        skeleton.linear(f"{at}.attn.c_proj", width, width, "attention_output", layer=i, transposed=True)
        skeleton.norm(f"{at}.ln_2", width)
        if c["add_cross_attention"]:
            skeleton.linear(f"{at}.crossattention.c_attn", 2 * width, width, transposed=True)
            skeleton.linear(f"{at}.crossattention.q_attn", width, width, transposed=True)
            skeleton.linear(f"{at}.crossattention.c_proj", width, width, transposed=True)
            skeleton.norm(f"{at}.ln_cross_attn", width)
        skeleton.linear(f"{at}.mlp.c_fc", inner, width, "intermediate", layer=i, transposed=True)
        skeleton.linear(f"{at}.mlp.c_proj", width, inner, "output", layer=i, transposed=True)
    skeleton.norm("ln_f", width)
    if head in ("LMHeadModel", "DoubleHeadsModel"):
        skeleton.output_embeddings("lm_head", c["vocab_size"], width, bias=None, tied=c["tie_word_embeddings"])
    if head == "DoubleHeadsModel" and c["summary_use_proj"]:
        # The model sets num_labels to 1 itself.
        _head(skeleton, "multiple_choice_head.summary", 1 if c["summary_proj_to_labels"] else width, width)
    if head == "ForSequenceClassification":
        _head(skeleton, "score", c["num_labels"], width, bias=False)
    if head == "ForTokenClassification":
        _head(skeleton, "classifier", c["num_labels"], width)
    if head == "ForQuestionAnswering":
        _head(skeleton, "qa_outputs", 2, width)


_ENCODER_DEFAULTS: dict[str, Any] = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "max_position_embeddings": 512,
    "type_vocab_size": 2,
    "is_decoder": False,
    "add_cross_attention": False,
    "tie_word_embeddings": True,
}
FAMILIES = {
    family.model_type: family
    for family in (
        Family(
            "bert",
            "BERT",
            "BertModel",
            "bert",
            (
                "BertModel",
                "BertForPreTraining",
                "BertForMaskedLM",
                "BertLMHeadModel",
                "BertForNextSentencePrediction",
                "BertForSequenceClassification",
                "BertForMultipleChoice",
                "BertForTokenClassification",
                "BertForQuestionAnswering",
            ),
            _bert,
            "embeddings.word_embeddings",
            {**_ENCODER_DEFAULTS, "vocab_size": 30522},
        ),
        Family(
            "roberta",
            "RoBERTa",
            "RobertaModel",
            "roberta",
            (
                "RobertaModel",
                "RobertaForMaskedLM",
                "RobertaForCausalLM",
                "RobertaForSequenceClassification",
                "RobertaForMultipleChoice",
                "RobertaForTokenClassification",
                "RobertaForQuestionAnswering",
            ),
            _roberta,
            "embeddings.word_embeddings",
            {**_ENCODER_DEFAULTS, "vocab_size": 50265},
        ),
        Family(
            "gpt2",
            "GPT-2",
            "GPT2Model",
            "transformer",
            (
                "GPT2Model",
                "GPT2LMHeadModel",
                "GPT2DoubleHeadsModel",
                "GPT2ForSequenceClassification",
                "GPT2ForTokenClassification",
                "GPT2ForQuestionAnswering",
            ),
            _gpt2,
            "wte",
            {
                "vocab_size": 50257,
                "n_positions": 1024,
                "n_embd": 768,
                "n_layer": 12,
                "n_head": 12,
                "add_cross_attention": False,
                "tie_word_embeddings": True,
                "summary_use_proj": True,
                "summary_proj_to_labels": True,
            },
        ),
    )
}


def family_of(config: Mapping[str, Any]) -> Family:
    """Return the family that a `config.json` belongs to.

    Raises:
        CompressionError: the model is compressed or quantized already, or its architecture is not supported.
    """
    model_type = config.get("model_type")
    if config.get("compression") or str(model_type).startswith("compressed_"):
        raise CompressionError(
            "This model is compressed already; pass the base model it was made from (`hf-offline-compress inspect` names it)."
        )
    if config.get("quantization_config"):
        raise CompressionError(
            "This model is quantized already (its config has a `quantization_config`); pass its full-precision base."
        )
    if model_type not in FAMILIES:
        raise CompressionError(
            f"The architecture '{model_type}' is not supported; supported are {listing(FAMILIES)} (as `model_type`)."
        )
    return FAMILIES[model_type]


def architecture_of(config: Mapping[str, Any], family: Family) -> str:
    """Return the stock class that a checkpoint was saved from; the base class where its config names none."""
    architectures = config.get("architectures") or [family.base_class]
    return str(architectures[0])
