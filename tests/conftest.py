import pytest


@pytest.fixture
def project(tmp_path, monkeypatch):
    "An empty folder to work in, with settings of its own, where all that is made or downloaded goes."
    (tmp_path / "settings.ini").write_text("[a]\nsteps = 5\nlr = 0.1\nsizes = 1, 2\n[a.gpu]\nsteps = 50\n[b]\n")
    monkeypatch.chdir(tmp_path)
    for name, place in (("SETTINGS", "settings.ini"), ("HOME", "home"), ("DATA", "data")):
        monkeypatch.setenv(f"DIFFUSION_NB_{name}", str(tmp_path / place))
    for name in ("DIFFUSION_NB_PROFILE", "DIFFUSION_NB_SET"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path
