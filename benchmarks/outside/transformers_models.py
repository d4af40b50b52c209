"""The Flax classes of transformers 4, each at a small width, with masks where it takes them."""

import types
from typing import Any

import jax
import jax.numpy as jnp

from outside.model import Built, count, drawn, images, keys, model, settled, tokens

TEXT = {
    "vocab_size": 50,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
TEXT |= {
    "intermediate_size": 64,
    "max_position_embeddings": 16,
    "initializer_range": 0.2,
}
VISION = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
VISION |= {
    "intermediate_size": 64,
    "image_size": 16,
    "patch_size": 4,
    "initializer_range": 0.2,
}


def spread(params: Any, key: jax.Array) -> Any:
    """Weights of the size that trained ones have: the default of 0.02 is for wide layers."""
    source = keys(key)

    def scaled(w: Any) -> Any:
        small = w.ndim > 1 and float(jnp.std(w)) < 0.1
        return 0.2 * jax.random.normal(next(source), w.shape) if small else w

    return jax.tree.map(scaled, params)


def flax_model(
    name: str, config: str, inputs: Any, key: jax.Array, **settings: Any
) -> Built:
    """A Flax class and its configuration, both by name; inputs are its arguments in order."""
    import transformers

    made = getattr(transformers, config)(**settings)
    whole = getattr(transformers, name)(made, seed=0)
    params = drawn(spread(whole.params, key), key)

    def apply(params, *arrays):
        return arrays_of(whole(*arrays, params=params))

    return Built(apply, params, inputs)


def arrays_of(outputs: Any) -> Any:
    return [y for y in outputs.to_tuple() if hasattr(y, "dtype")]


def padded(key: jax.Array, n: int) -> tuple[Any, ...]:
    """Token numbers, and a mask of those that are not padding."""
    lengths = jax.random.randint(key, (n, 1), 6, 13)
    mask = (jnp.arange(12) < lengths).astype(jnp.int32)
    return tokens(12, 50)(key, n)[0] * mask, mask


def pixels(key: jax.Array, n: int) -> tuple[Any, ...]:
    return (jnp.transpose(images(16)(key, n)[0], (0, 3, 1, 2)),)


@model("FlaxBert", "transformers")
def bert(key):
    return flax_model("FlaxBertModel", "BertConfig", padded, key, **TEXT)


@model("FlaxRoberta", "transformers")
def roberta(key):
    return flax_model("FlaxRobertaModel", "RobertaConfig", padded, key, **TEXT)


@model("FlaxElectra", "transformers")
def electra(key):
    small = {**TEXT, "embedding_size": 16}
    return flax_model("FlaxElectraModel", "ElectraConfig", padded, key, **small)


@model("FlaxAlbert", "transformers")
def albert(key):  # one layer, used several times
    small = {**TEXT, "embedding_size": 16}
    return flax_model("FlaxAlbertModel", "AlbertConfig", padded, key, **small)


@model("FlaxDistilBert", "transformers")
def distilbert(key):
    small = {"vocab_size": 50, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64}
    small |= {"max_position_embeddings": 16}
    return flax_model("FlaxDistilBertModel", "DistilBertConfig", padded, key, **small)


GPT = {"vocab_size": 50, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 16}


@model("FlaxGPT2LMHead", "transformers")
def gpt2(key):
    return flax_model("FlaxGPT2LMHeadModel", "GPT2Config", tokens(12, 50), key, **GPT)


@model("FlaxGPTJ", "transformers")
def gptj(key):
    return flax_model(
        "FlaxGPTJModel", "GPTJConfig", tokens(12, 50), key, **GPT, rotary_dim=4
    )


@model("FlaxGPTNeo", "transformers")
def gpt_neo(key):
    small = {k: v for k, v in TEXT.items() if not k.startswith("num")}
    small |= {"num_layers": 2, "num_heads": 4, "window_size": 4}
    small["attention_types"] = [[["global", "local"], 1]]
    return flax_model("FlaxGPTNeoModel", "GPTNeoConfig", tokens(12, 50), key, **small)


@model("FlaxLlama", "transformers")
def llama(key):
    small = {**TEXT, "num_key_value_heads": 2}
    return flax_model(
        "FlaxLlamaForCausalLM", "LlamaConfig", tokens(12, 50), key, **small
    )


@model("FlaxMistral", "transformers")
def mistral(key):
    small = {**TEXT, "num_key_value_heads": 2, "sliding_window": 4}
    return flax_model("FlaxMistralModel", "MistralConfig", tokens(12, 50), key, **small)


@model("FlaxGemma", "transformers")
def gemma(key):
    small = {**TEXT, "num_key_value_heads": 1, "head_dim": 8}
    return flax_model("FlaxGemmaModel", "GemmaConfig", tokens(12, 50), key, **small)


@model("FlaxBloom", "transformers")
def bloom(key):  # ALiBi
    small = {"vocab_size": 50, "hidden_size": 32, "n_layer": 2, "n_head": 4}
    return flax_model("FlaxBloomModel", "BloomConfig", padded, key, **small)


@model("FlaxOPT", "transformers")
def opt(key):
    small = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "ffn_dim": 64}
    small |= {
        "num_attention_heads": 4,
        "max_position_embeddings": 16,
        "word_embed_proj_dim": 32,
    }
    return flax_model("FlaxOPTModel", "OPTConfig", padded, key, **small)


def encoder_decoder(whole: Any, key: jax.Array) -> Built:
    """A model of padded source tokens and target tokens."""
    params = drawn(spread(whole.params, key), key)

    def apply(params, ids, mask, target):
        outputs = whole(
            ids, attention_mask=mask, decoder_input_ids=target, params=params
        )
        return outputs.last_hidden_state

    inputs = lambda key, n: (*padded(key, n), *tokens(8, 50)(key, n))
    return Built(apply, params, inputs)


def let_t5_clip() -> None:
    """T5 names the bounds of jnp.clip as JAX did until 2025."""
    from transformers.models.t5 import modeling_flax_t5 as module

    def clip(x, a_min=None, a_max=None):
        return jnp.clip(x, a_min, a_max)

    module.jnp = types.SimpleNamespace(**{**vars(jnp), "clip": clip})


@model("FlaxT5Encoder", "transformers")
def t5_encoder(key):
    let_t5_clip()
    small = {"vocab_size": 50, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2}
    small |= {"num_heads": 4, "relative_attention_num_buckets": 8}
    return flax_model("FlaxT5EncoderModel", "T5Config", padded, key, **small)


@model("FlaxT5", "transformers")
def t5(key):
    import transformers

    let_t5_clip()
    small = {"vocab_size": 50, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2}
    small |= {"num_heads": 4, "relative_attention_num_buckets": 8}
    whole = transformers.FlaxT5Model(transformers.T5Config(**small), seed=0)
    return encoder_decoder(whole, key)


@model("FlaxBart", "transformers")
def bart(key):
    import transformers

    small = {"vocab_size": 50, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1}
    small |= {
        "encoder_ffn_dim": 64,
        "decoder_ffn_dim": 64,
        "max_position_embeddings": 16,
    }
    small |= {
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "init_std": 0.2,
    }
    whole = transformers.FlaxBartModel(transformers.BartConfig(**small), seed=0)
    return encoder_decoder(whole, key)


@model("FlaxViT", "transformers")
def vit(key):
    return flax_model("FlaxViTModel", "ViTConfig", pixels, key, **VISION)


@model("FlaxBeit", "transformers")
def beit(key):
    return flax_model(
        "FlaxBeitModel",
        "BeitConfig",
        pixels,
        key,
        **VISION,
        use_relative_position_bias=True,
        vocab_size=50,
    )


@model("FlaxDinov2", "transformers")
def dinov2(key):
    return flax_model("FlaxDinov2Model", "Dinov2Config", pixels, key, **VISION)


@model("FlaxCLIP", "transformers")
def clip(key):
    import transformers

    config = transformers.CLIPConfig(
        text_config={**TEXT, "eos_token_id": 49},
        vision_config=VISION,
        projection_dim=16,
    )
    whole = transformers.FlaxCLIPModel(
        config, input_shape=((1, 12), (1, 16, 16, 3)), seed=0
    )
    params = drawn(spread(whole.params, key), key)

    def apply(params, ids, mask, pictures):
        outputs = whole(ids, pictures, attention_mask=mask, params=params)
        return outputs.text_embeds, outputs.image_embeds

    return Built(apply, params, lambda key, n: (*padded(key, n), *pixels(key, n)))


def convolutional(name: str, config: str, key: jax.Array, **settings: Any) -> Built:
    """A Flax class with batch norms: its variables are weights and statistics."""
    import transformers

    made = getattr(transformers, config)(**settings)
    whole = getattr(transformers, name)(made, input_shape=(1, 32, 32, 3), seed=0)
    pictures = lambda key, n: (jnp.transpose(images(32)(key, n)[0], (0, 3, 1, 2)),)
    some = pictures(key, 16)

    def train(params):
        _, new = whole(*some, params=params, train=True)
        return {**params, **new}

    params = drawn(whole.params, key)
    params = settled(train, params, key)
    apply = lambda params, x: arrays_of(whole(x, params=params))
    return Built(apply, params, pictures, count(params))


@model("FlaxResNet", "transformers")
def resnet(key):
    small = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 2]}
    return convolutional("FlaxResNetModel", "ResNetConfig", key, **small)


@model("FlaxRegNet", "transformers")
def regnet(key):
    small = {
        "embedding_size": 8,
        "hidden_sizes": [8, 16],
        "depths": [1, 1],
        "groups_width": 4,
    }
    return convolutional("FlaxRegNetModel", "RegNetConfig", key, **small)


@model("FlaxWhisper", "transformers")
def whisper(key):
    import transformers

    small = {"vocab_size": 50, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1}
    small |= {
        "encoder_ffn_dim": 64,
        "decoder_ffn_dim": 64,
        "num_mel_bins": 8,
        "init_std": 0.2,
    }
    small |= {
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "pad_token_id": 0,
    }
    small |= {
        "max_source_positions": 8,
        "max_target_positions": 16,
        "decoder_start_token_id": 1,
    }
    small |= {"bos_token_id": 1, "eos_token_id": 2}
    whole = transformers.FlaxWhisperModel(
        transformers.WhisperConfig(**small), input_shape=(1, 8, 16), seed=0
    )
    params = drawn(spread(whole.params, key), key)

    def apply(params, sound, target):
        return whole(sound, target, params=params).last_hidden_state

    def inputs(key, n):
        sound = jax.random.uniform(key, (n, 8, 16), minval=-1.0)
        return sound, *tokens(8, 50)(key, n)

    return Built(apply, params, inputs)
