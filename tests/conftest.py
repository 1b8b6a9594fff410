import pytest


@pytest.fixture
def project(tmp_path, monkeypatch):
    "An empty project to work in: a folder with a settings.ini and nothing else, and no settings from outside."
    (tmp_path / "settings.ini").write_text("[a]\nsteps = 5\nlr = 0.1\nsizes = 1, 2\n[a.gpu]\nsteps = 50\n[b]\n")
    monkeypatch.chdir(tmp_path)
    for name in ("DIFFUSION_NB_PROFILE", "DIFFUSION_NB_SET"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path
