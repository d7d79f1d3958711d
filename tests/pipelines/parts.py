"""Tiny random components and input images that pipelines have in common."""

from typing import Any

import diffusers
import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers

from pipelines.entry import Kwargs

WORDS = "a an the red green blue cat dog sun moon hill lake on under over of"
VOCABULARY = ["<pad>", "</s>", "<unk>", *WORDS.split()]


def tokenizer(max_length: int = 16) -> transformers.PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=max_length
    )
    made.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    return made


def clip(*, has_projection: bool = False) -> transformers.CLIPTextModel:
    config = transformers.CLIPTextConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=32,
        intermediate_size=37,
        num_hidden_layers=2,
        num_attention_heads=4,
        projection_dim=32,
        max_position_embeddings=16,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=0,
    )
    return (transformers.CLIPTextModelWithProjection if has_projection else transformers.CLIPTextModel)(config).eval()


def t5() -> transformers.T5EncoderModel:
    config = transformers.T5Config(vocab_size=len(VOCABULARY), d_model=32, d_ff=37, d_kv=8, num_layers=2, num_heads=4)
    return transformers.T5EncoderModel(config).eval()


def qwen3(model: str = "Qwen3Model") -> transformers.Qwen3PreTrainedModel:
    config = transformers.Qwen3Config(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        vocab_size=len(VOCABULARY),
    )
    return getattr(transformers, model)(config).eval()


def vae(latent_channels: int = 4, **config: Any) -> diffusers.AutoencoderKL:
    return diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
        up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
        block_out_channels=(8, 16),
        norm_num_groups=4,
        latent_channels=latent_channels,
        **config,
    ).eval()


def wan_vae() -> diffusers.AutoencoderKLWan:
    return diffusers.AutoencoderKLWan(
        base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    ).eval()


def redrawn(module: torch.nn.Module, part: str, std: float = 1.0) -> None:
    """Draw parameters with `part` in their names anew: untrained they are zeros, small or not initialised."""
    for name, parameter in module.named_parameters():
        if part in name:
            torch.nn.init.normal_(parameter, std=std)


def controlnet_of(unet: diffusers.UNet2DConditionModel) -> diffusers.ControlNetModel:
    controlnet = diffusers.ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(8, 16))
    redrawn(controlnet, "controlnet_", std=0.1)
    return controlnet


def ip_adapter(unet: diffusers.UNet2DConditionModel) -> None:
    """Add a random IP-Adapter for embeddings of 32 numbers, with four tokens for a picture."""
    width, num_tokens = unet.config.cross_attention_dim, 4
    image_proj = {
        "proj.weight": torch.randn(num_tokens * width, 32),
        "proj.bias": torch.zeros(num_tokens * width),
        "norm.weight": torch.ones(width),
        "norm.bias": torch.zeros(width),
    }
    names = [name for name in unet.attn_processors if "attn2" in name]
    hidden = [unet.get_submodule(name.removesuffix(".processor")).to_k.weight.shape[0] for name in names]
    keys = [(2 * index + 1, matrix) for index in range(len(names)) for matrix in ("to_k_ip", "to_v_ip")]
    layers = {f"{key}.{matrix}.weight": torch.randn(hidden[key // 2], width) for key, matrix in keys}
    unet._load_ip_adapter_weights([{"image_proj": image_proj, "ip_adapter": layers}])


def picture(index: int, kwargs: Kwargs) -> Image.Image:
    """An input image of a request's size; each index has its own colours."""
    plain = Image.new("RGB", (kwargs["width"], kwargs["height"]), (60 * index, 255 - 60 * index, 100))
    plain.paste((255 - 80 * index, 80 * index, 200), (0, 0, kwargs["width"] // 2, kwargs["height"] // 2))
    return plain


def image(index: int, kwargs: Kwargs) -> Kwargs:
    return {"image": picture(index, kwargs)}


def image_and_mask(index: int, kwargs: Kwargs) -> Kwargs:
    """The lower part of the picture is to be painted."""
    mask = Image.new("L", (kwargs["width"], kwargs["height"]))
    mask.paste(255, (0, kwargs["height"] // 4 + index, kwargs["width"], kwargs["height"]))
    return {"image": picture(index, kwargs), "mask_image": mask}


def control_image(index: int, kwargs: Kwargs) -> Kwargs:
    return {"control_image": picture(index, kwargs)}


def image_embeds(index: int, _kwargs: Kwargs) -> Kwargs:
    """What the encoder of an IP-Adapter would make of a picture, and of none."""
    embeds = torch.randn(1, 1, 32, generator=torch.Generator().manual_seed(index))
    return {"ip_adapter_image_embeds": [torch.cat([torch.zeros_like(embeds), embeds])]}
