"""A folder of images without captions, at any depth."""

from uae_jax.data.formats.listing import Listing
from uae_jax.data.formats.records import FileRecords, ReadOptions


class Images(FileRecords):
    """All image files of a folder and its subfolders, by path.

    Raises:
      ValueError: there is none.
    """

    name = "images"
    title = "a folder of images without captions"

    def __init__(self, listing: Listing, options: ReadOptions):
        super().__init__(listing.folder, options)
        self.rows = [(listing.below(file), ()) for file in listing.images]
        if not self.rows:
            raise ValueError(f"{listing.folder} holds no images (such as .png, .jpg, .webp or .tif)")

    @staticmethod
    def found(listing: Listing) -> list[str]:
        """What in the folder is of this format: one image."""
        return [listing.below(file) for file in listing.images[:1]]

    def remedy(self, index: int) -> str:
        """A text file beside the image makes it the format `text_files`."""
        name = self.name_of(index).rpartition(".")[0]
        return f"write a caption beside every image ({self.folder / name}.txt), or one captions.jsonl"
