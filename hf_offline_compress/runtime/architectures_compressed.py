"""The supported architectures, one entry each: what cannot be read off the stock model.

An entry names the stock classes, and for each weight matrix its kind, by the name of its module: within a layer by what
follows the layer's number, elsewhere by the name within the base model. A fused module names the kinds of its parts, in
the order of its outputs. Everything else is read off the stock model: heads, shapes, ties, biases, word embeddings, and matrices
of heads, which are of the kind "head". Nothing is imported here.
"""

Kind = str | tuple[str, ...]
QUERY_KEY_VALUE = ("query", "key", "value")


class Architecture:
    """One entry.

    Attributes:
        title: its name in texts.
        config: stock config class.
        base: stock class without a head; names of heads begin as it does.
        kinds: module → kind of its matrix, or kinds of its fused parts.
        heads: stock classes that are in no auto class.
        optional: modules of the base model that a checkpoint may lack.
        causal: whether a position sees earlier tokens only, whatever its config says.
        discriminative: heads that detect replaced tokens.
        positions_from_padding: whether position ids start after the padding token's id.
    """

    def __init__(
        self,
        title: str,
        config: str,
        base: str,
        kinds: dict[str, Kind],
        *,
        heads: tuple[str, ...] = (),
        optional: tuple[str, ...] = (),
        causal: bool = False,
        discriminative: tuple[str, ...] = (),
        positions_from_padding: bool = False,
    ) -> None:
        """See the class."""
        self.title, self.config, self.base, self.kinds = title, config, base, kinds
        self.heads, self.optional, self.causal = heads, optional, causal
        self.discriminative, self.positions_from_padding = discriminative, positions_from_padding


_BERT_LAYER: dict[str, Kind] = {
    "embeddings.position_embeddings": "position_embeddings",
    "attention.output.dense": "attention_output",
    "intermediate.dense": "intermediate",
    "output.dense": "output",
    "pooler.dense": "pooler",
}
_BERT: dict[str, Kind] = {
    **_BERT_LAYER,
    "attention.self.query": "query",
    "attention.self.key": "key",
    "attention.self.value": "value",
}
_QKV: dict[str, Kind] = {"self_attn.q_proj": "query", "self_attn.k_proj": "key", "self_attn.v_proj": "value"}
_GATED: dict[str, Kind] = {"mlp.gate_proj": "gate", "mlp.up_proj": "intermediate", "mlp.down_proj": "output"}
_LLAMA: dict[str, Kind] = {**_QKV, "self_attn.o_proj": "attention_output", **_GATED}

ARCHITECTURES: dict[str, Architecture] = {
    "bert": Architecture("BERT", "BertConfig", "BertModel", _BERT, optional=("pooler",)),
    "roberta": Architecture(
        "RoBERTa", "RobertaConfig", "RobertaModel", _BERT, optional=("pooler",), positions_from_padding=True
    ),
    "gpt2": Architecture(
        "GPT-2",
        "GPT2Config",
        "GPT2Model",
        {
            "wpe": "position_embeddings",
            "attn.c_attn": QUERY_KEY_VALUE,
            "attn.c_proj": "attention_output",
            "mlp.c_fc": "intermediate",
            "mlp.c_proj": "output",
        },
        heads=("GPT2DoubleHeadsModel",),
        causal=True,
    ),
    "xlm-roberta": Architecture(
        "XLM-RoBERTa", "XLMRobertaConfig", "XLMRobertaModel", _BERT, optional=("pooler",), positions_from_padding=True
    ),
    "camembert": Architecture(
        "CamemBERT", "CamembertConfig", "CamembertModel", _BERT, optional=("pooler",), positions_from_padding=True
    ),
    "distilbert": Architecture(
        "DistilBERT",
        "DistilBertConfig",
        "DistilBertModel",
        {
            "embeddings.position_embeddings": "position_embeddings",
            "attention.q_lin": "query",
            "attention.k_lin": "key",
            "attention.v_lin": "value",
            "attention.out_lin": "attention_output",
            "ffn.lin1": "intermediate",
            "ffn.lin2": "output",
        },
    ),
    "electra": Architecture(
        "ELECTRA",
        "ElectraConfig",
        "ElectraModel",
        {**_BERT, "embeddings_project": "embedding_projection"},
        discriminative=("ElectraForPreTraining",),
    ),
    "mpnet": Architecture(
        "MPNet",
        "MPNetConfig",
        "MPNetModel",
        {
            **_BERT_LAYER,
            "attention.attn.q": "query",
            "attention.attn.k": "key",
            "attention.attn.v": "value",
            "attention.attn.o": "attention_output",
        },
        optional=("pooler",),
        positions_from_padding=True,
    ),
    "deberta-v2": Architecture(
        "DeBERTa-v2",
        "DebertaV2Config",
        "DebertaV2Model",
        {
            **_BERT_LAYER,
            "embeddings.embed_proj": "embedding_projection",
            "attention.self.query_proj": "query",
            "attention.self.key_proj": "key",
            "attention.self.value_proj": "value",
            "attention.self.pos_query_proj": "position_query",
            "attention.self.pos_key_proj": "position_key",
        },
    ),
    "modernbert": Architecture(
        "ModernBERT",
        "ModernBertConfig",
        "ModernBertModel",
        {
            "attn.Wqkv": QUERY_KEY_VALUE,
            "attn.Wo": "attention_output",
            "mlp.Wi": ("gate", "intermediate"),
            "mlp.Wo": "output",
        },
    ),
    "albert": Architecture(
        "ALBERT",
        "AlbertConfig",
        "AlbertModel",
        {
            "embeddings.position_embeddings": "position_embeddings",
            "encoder.embedding_hidden_mapping_in": "embedding_projection",
            "attention.query": "query",
            "attention.key": "key",
            "attention.value": "value",
            "attention.dense": "attention_output",
            "ffn": "intermediate",
            "ffn_output": "output",
            "pooler": "pooler",
        },
        optional=("pooler",),
    ),
    "gpt_neo": Architecture(
        "GPT-Neo",
        "GPTNeoConfig",
        "GPTNeoModel",
        {
            "wpe": "position_embeddings",
            "attn.attention.q_proj": "query",
            "attn.attention.k_proj": "key",
            "attn.attention.v_proj": "value",
            "attn.attention.out_proj": "attention_output",
            "mlp.c_fc": "intermediate",
            "mlp.c_proj": "output",
        },
        causal=True,
    ),
    "opt": Architecture(
        "OPT",
        "OPTConfig",
        "OPTModel",
        {
            "decoder.project_in": "embedding_projection",
            "decoder.project_out": "embedding_projection",
            **_QKV,
            "self_attn.out_proj": "attention_output",
            "fc1": "intermediate",
            "fc2": "output",
        },
        causal=True,
    ),
    "llama": Architecture("Llama", "LlamaConfig", "LlamaModel", _LLAMA, causal=True),
    "mistral": Architecture("Mistral", "MistralConfig", "MistralModel", _LLAMA, causal=True),
    "qwen2": Architecture("Qwen2", "Qwen2Config", "Qwen2Model", _LLAMA, causal=True),
    "qwen3": Architecture("Qwen3", "Qwen3Config", "Qwen3Model", _LLAMA, causal=True),
    "phi3": Architecture(
        "Phi-3",
        "Phi3Config",
        "Phi3Model",
        {
            "self_attn.qkv_proj": QUERY_KEY_VALUE,
            "self_attn.o_proj": "attention_output",
            "mlp.gate_up_proj": ("gate", "intermediate"),
            "mlp.down_proj": "output",
        },
        causal=True,
    ),
}
_FUSED = [kind for entry in ARCHITECTURES.values() for kind in entry.kinds.values() if isinstance(kind, tuple)]
FUSED_PARTS = tuple(dict.fromkeys(part for parts in _FUSED for part in parts))
TYPE_PREFIX = "compressed_"
CLASS_PREFIX = "Compressed"
MODEL_TYPES = tuple(f"{TYPE_PREFIX}{model_type}" for model_type in ARCHITECTURES)


def architecture_of(model_type: str) -> Architecture | None:
    """Return the entry of a model type, stock or ours; None if there is none."""
    return ARCHITECTURES.get(model_type.removeprefix(TYPE_PREFIX))


def token_limit(config: dict[str, object]) -> int | None:
    """Return the most tokens that a model takes, according to its config; None if the config does not say."""
    positions = config.get("max_position_embeddings") or config.get("n_positions")
    if not isinstance(positions, int):
        return None
    entry, pad = architecture_of(str(config.get("model_type"))), config.get("pad_token_id")
    if entry and entry.positions_from_padding:
        positions -= (pad if isinstance(pad, int) else 0) + 1
    return positions


def within_layer(name: str) -> str:
    """Return the part of a module's name after its last number, or the whole name: its key in `Architecture.kinds`."""
    parts = name.split(".")
    numbers = [i for i, part in enumerate(parts) if part.isdecimal()]
    return ".".join(parts[numbers[-1] + 1 :]) if numbers else name


def part_rows(parts: tuple[str, ...], rows: int, heads: int, key_value_heads: int) -> dict[str, int]:
    """Return the number of rows of each part of a fused module; keys and values may have fewer heads than queries.

    Args:
        parts: kinds, in order.
        rows: of all parts.
        heads: of the queries.
        key_value_heads: of keys, and of values.
    """
    if parts != QUERY_KEY_VALUE:
        return dict.fromkeys(parts, rows // len(parts))
    width = rows // (heads + 2 * key_value_heads)
    return {"query": heads * width, "key": key_value_heads * width, "value": key_value_heads * width}
