from sgld.engine.stages import AGAIN_S, Stages


class _Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_stage_is_logged_once_and_again_while_it_takes_long() -> None:
    clock = _Clock()
    stages = Stages(clock)
    assert stages.heard("reading unet") == "reading unet (0 s)"
    clock.now += 2
    assert stages.heard("reading unet") is None
    clock.now += AGAIN_S
    assert stages.heard("reading unet") == "still reading unet (12 s)"
    assert stages.heard("starting") == "starting (12 s)"
    assert stages.elapsed_s == 12
