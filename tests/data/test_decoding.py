import io
import warnings

import numpy as np
import pytest
from PIL import Image

from pqf_jax import errors
from pqf_jax.data import decoding

NUM_CLASSES = 50
# Warnings that a test does not expect itself.
pytestmark = pytest.mark.filterwarnings("ignore:.*cannot be decoded")


class Images(list):
  """Encoded images in memory."""

  def read_all(self):
    return iter(self)

  def place(self, index: int) -> str:
    return f"image {index} of shelf"


def encode(color: int, **settings) -> bytes:
  file = io.BytesIO()
  pixels = np.full((24, 40, 3), color, np.uint8)
  # A corner that differs, so that a file is long enough to be cut short.
  pixels[:12, :20] = np.random.default_rng(color).integers(
    0, 256, (12, 20, 3), dtype=np.uint8
  )
  Image.fromarray(pixels).save(file, **settings)
  return file.getvalue()


JPEG = {"format": "jpeg", "quality": 95}
DAMAGED = {
  "cut in the middle": lambda data: data[: len(data) // 2],
  "cut at its last bytes": lambda data: data[:-300],
  "empty": lambda data: b"",
  "no image": lambda data: b"<html>not found</html>" * 30,
  "zeros": lambda data: bytes(len(data)),
  "only a header": lambda data: data[:200],
}


def shelf(bad: dict[int, bytes], count: int = 30) -> Images:
  return Images(
    decoding.EncodedImage(bad.get(i, encode(5 * i, **JPEG)), i)
    for i in range(count)
  )


def same(image: Image.Image) -> Image.Image:
  return image


@pytest.mark.parametrize("damage", DAMAGED.values(), ids=DAMAGED)
@pytest.mark.parametrize("encoding", ["jpeg", "png"])
def test_a_damaged_training_image_is_replaced_by_the_next(damage, encoding):
  bad = {i: damage(encode(5 * i, format=encoding)) for i in (3, 4, 29)}
  records = decoding.for_training(shelf(bad), NUM_CLASSES, same)
  with pytest.warns(
    UserWarning, match="image 3 of shelf cannot be decoded"
  ) as warned:
    record = records[3]
  assert "object at" not in str(warned[0].message)
  np.testing.assert_array_equal(record["image"], records[5]["image"])
  assert record["label"] == 5
  assert records.damaged == {3, 4}
  with pytest.warns(UserWarning, match="so far: 3; more than 10 are an error"):
    assert records[29]["label"] == 0
  assert records.damaged == {3, 4, 29}


def test_replacement_does_not_depend_on_what_was_read_before():
  bad = {i: b"spoiled" for i in (0, 7, 8, 9, 22, 29)}
  in_order, backwards, at_once = (
    decoding.for_training(shelf(bad), NUM_CLASSES, same) for _ in range(3)
  )
  labels = [in_order[i]["label"] for i in range(30)]
  again = [backwards[i]["label"] for i in reversed(range(30))]
  assert labels == again[::-1]
  in_memory = decoding.InMemory(at_once)
  assert [in_memory[i]["label"] for i in range(30)] == labels
  assert labels[7:10] == [10, 10, 10]


def test_an_image_is_reported_once():
  records = decoding.for_training(shelf({3: b"spoiled"}), NUM_CLASSES, same)
  with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(3):
      records[3]
  assert len(caught) == 1


def test_more_damaged_images_than_their_share_are_an_error():
  encoded = shelf({i: b"spoiled" for i in range(11)})
  records = decoding.for_training(encoded, NUM_CLASSES, same)
  with (
    pytest.warns(UserWarning, match="so far: 10;"),
    pytest.raises(
      errors.InputError,
      match="image 10 of shelf .* 11 of 30 images are damaged",
    ),
  ):
    records[0]


def test_the_share_is_one_in_a_thousand():
  encoded = Images([decoding.EncodedImage(b"spoiled", 0)] * 20_000)
  records = decoding.for_training(encoded, NUM_CLASSES, same)
  with pytest.raises(errors.InputError, match="21 of 20000 images are damaged"):
    records[100]


def test_a_split_of_nothing_but_damaged_images_is_an_error():
  encoded = shelf({i: b"spoiled" for i in range(4)}, 4)
  with (
    pytest.warns(UserWarning),
    pytest.raises(
      errors.InputError, match="4 of 4 images are damaged, more than the 3"
    ),
  ):
    decoding.for_training(encoded, NUM_CLASSES, same)[1]


def test_a_damaged_test_image_is_an_error():
  records = decoding.Records(shelf({3: b"spoiled"}), NUM_CLASSES, same)
  assert records[2]["label"] == 2
  with pytest.raises(
    errors.InputError,
    match="image 3 of shelf .* the accuracy needs every test image",
  ):
    records[3]


@pytest.mark.parametrize("label", [-1, NUM_CLASSES])
@pytest.mark.parametrize("make", [decoding.for_training, decoding.Records])
def test_a_label_outside_the_classes(make, label):
  encoded = shelf({})
  encoded[3] = encoded[3]._replace(label=label)
  with pytest.raises(
    errors.InputError, match=f"image 3 of shelf has label {label}, .* 0 to 49"
  ):
    make(encoded, NUM_CLASSES, same)[3]


@pytest.mark.parametrize("mode", ["L", "CMYK", "YCbCr", "RGB"])
@pytest.mark.parametrize("encoding", ["jpeg", "tiff"])
def test_every_kind_of_image_becomes_rgb(mode, encoding):
  file = io.BytesIO()
  rgb = Image.new("RGB", (16, 16), (200, 100, 50))
  rgb.convert(mode).save(file, encoding)
  encoded = Images([decoding.EncodedImage(file.getvalue(), 0)])
  image = decoding.Records(encoded, NUM_CLASSES, same)[0]["image"]
  # ITU-R 601-2: 0.299 red, 0.587 green, 0.114 blue.
  expected = (124, 124, 124) if mode == "L" else (200, 100, 50)
  assert image.shape == (16, 16, 3)
  np.testing.assert_allclose(image[8, 8].astype(int), expected, atol=4)


@pytest.mark.parametrize("mode", ["P", "RGBA", "LA", "1"])
def test_every_kind_of_png_becomes_rgb(mode):
  file = io.BytesIO()
  Image.new("RGB", (16, 16), (255, 255, 255)).convert(mode).save(file, "png")
  encoded = Images([decoding.EncodedImage(file.getvalue(), 0)])
  image = decoding.Records(encoded, NUM_CLASSES, same)[0]["image"]
  assert image.shape == (16, 16, 3)
  assert (image == 255).all()
