"""A model that is one file: its configuration, its weights and the files it needs (NeMo's ``.nemo``)."""

from pathlib import Path

from torch import nn

import anyckpt.torch


@anyckpt.torch.register_class  # Restorable.restore_from may build it; nothing in an archive is ever imported
class Tagger(anyckpt.torch.Restorable, nn.Module):
    """Tags characters."""

    def __init__(self, cfg, trainer=None):
        super().__init__(cfg, trainer)
        vocabulary = self.register_artifact("vocabulary", self.cfg.vocabulary)  # travels in the .nemo
        self.letters = Path(vocabulary).read_text().split()
        self.encoder = nn.Embedding(len(self.letters), self.cfg.dim)
        self.decoder = nn.Linear(self.cfg.dim, self.cfg.tags)


def main():
    Path("letters.txt").write_text("a b c")
    model = Tagger({"dim": 8, "tags": 3, "vocabulary": "letters.txt"})
    model.save_to("tagger.nemo")
    Path("letters.txt").unlink()

    again = anyckpt.torch.Restorable.restore_from("tagger.nemo", map_location="cpu")
    print(type(again).__name__, again.letters, f"({again.restored})")
    again.save_pretrained("tagger")  # config.json and model.safetensors; push_to_hub sends them

    larger = Tagger({**again.cfg, "tags": 5})
    report = anyckpt.torch.initialise(larger, "tagger.nemo", rename={"decoder.": None}, may_miss=["decoder.*"])
    print(report)


if __name__ == "__main__":
    main()
