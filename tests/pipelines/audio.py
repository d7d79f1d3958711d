"""Stable Audio."""

from typing import Any

import diffusers

from pipelines.entry import Entry
from pipelines.parts import t5, tokenizer


def stable_audio() -> Any:
    transformer = diffusers.StableAudioDiTModel(
        sample_size=8,
        in_channels=3,
        num_layers=2,
        attention_head_dim=4,
        num_attention_heads=4,
        num_key_value_attention_heads=2,
        out_channels=3,
        cross_attention_dim=4,
        time_proj_dim=8,
        global_states_input_dim=8,
        cross_attention_input_dim=4,
    )
    decoder = diffusers.AutoencoderOobleck(
        encoder_hidden_size=6,
        downsampling_ratios=[1, 2],
        decoder_channels=3,
        decoder_input_channels=3,
        audio_channels=2,
        channel_multiples=[2, 4],
        sampling_rate=4,
    )
    projection = diffusers.StableAudioProjectionModel(
        text_encoder_dim=32, conditioning_dim=4, min_value=0, max_value=32
    )
    scheduler = diffusers.EDMDPMSolverMultistepScheduler(solver_order=2, prediction_type="v_prediction", sigma_data=1.0)
    return diffusers.StableAudioPipeline(decoder.eval(), t5(), projection, tokenizer(), transformer, scheduler)


PIPELINES = {
    "stable_audio": Entry(stable_audio, {"audio_end_in_s": 3.0}, kind="text to audio", second={"audio_end_in_s": 2.0}),
}
