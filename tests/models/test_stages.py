from sgld.config import EngineConfig
from sgld.models.load import load


class _Told:
    def __init__(self) -> None:
        self.stages: list[str] = []
        self.at_once: list[str] = []

    def __call__(self, stage: str, *, at_once: bool = False) -> None:
        self.stages.append(stage)
        if at_once:
            self.at_once.append(stage)


def test_who_waits_hears_what_is_read_and_what_it_took() -> None:
    told = _Told()
    model = load(EngineConfig(model_path="sgld/tiny-image", device="cpu"), tell=told)
    assert "reading scheduler" in told.stages
    read = [stage.partition(",")[0] for stage in told.at_once if stage.startswith("read ")]
    assert sorted(read) == ["read text_encoder", "read transformer", "read vae"]
    assert told.stages[0] == f"looking at {model.model_path}"


def test_nobody_is_told_of_later_loads() -> None:
    told = _Told()
    load(EngineConfig(model_path="sgld/tiny-image", device="cpu"), tell=told)
    num = len(told.stages)
    load(EngineConfig(model_path="sgld/tiny-image", device="cpu"))
    assert len(told.stages) == num
