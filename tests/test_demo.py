from palm_haiku import demo


def test_the_demo_trains_draws_samples_and_says_what_is_next(tmp_path, capsys):
  assert demo.main(["--steps", "2", "--out", str(tmp_path)]) == 0
  out = capsys.readouterr().out
  run = tmp_path / "demo"
  for text in ("$ palm-haiku train", "train loss", "held-out loss", "nats per token",
               "bits per byte", "$ palm-haiku generate", "The for statement", "What to type next",
               f"palm-haiku generate {run}"):
    assert text in out, text
  assert (run / "loss.png").exists() and (run / "checkpoints" / "2").is_dir()
  # A second demo leaves the first alone.
  assert demo._fresh(run) == tmp_path / "demo-2"
