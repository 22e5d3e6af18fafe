import io
import os
import struct
import warnings
import zlib

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


def opened(data: bytes, **settings) -> np.ndarray:
  return np.asarray(decoding.open_image(data, **settings))


def saved(pixels: np.ndarray | Image.Image, encoding: str, **settings) -> bytes:
  file = io.BytesIO()
  if isinstance(pixels, np.ndarray):
    pixels = Image.fromarray(pixels)
  pixels.save(file, encoding, **settings)
  return file.getvalue()


def png(header: tuple[int, ...], row: bytes, transparent: bytes) -> bytes:
  """Encodes one row of pixels: width, height, depth and color type."""

  def chunk(name: bytes, content: bytes) -> bytes:
    check = struct.pack(">I", zlib.crc32(name + content))
    return struct.pack(">I", len(content)) + name + content + check

  return (
    b"\x89PNG\r\n\x1a\n"
    + chunk(b"IHDR", struct.pack(">IIBBBBB", *header, 0, 0, 0))
    + (chunk(b"tRNS", transparent) if transparent else b"")
    + chunk(b"IDAT", zlib.compress(b"\0" + row))
    + chunk(b"IEND", b"")
  )


GRAY = np.arange(0, 240, dtype=np.uint8).reshape(12, 20)


@pytest.mark.parametrize("encoding", ["png", "ppm"])
def test_16_bits_are_scaled_to_8(encoding):
  deep = GRAY.astype(np.uint16) * 257
  np.testing.assert_array_equal(
    opened(saved(deep, encoding)), opened(saved(GRAY, encoding))
  )
  assert opened(saved(deep, encoding))[2, 3].tolist() == [43] * 3


def test_16_bits_of_color_are_scaled_to_8():
  deep = struct.pack(">3H", 257 * 200, 257 * 100, 257 * 50)
  image = opened(b"P6 1 1 65535\n" + deep)
  assert image.tolist() == [[[200, 100, 50]]]


@pytest.mark.parametrize(
  ("encoding", "dtype", "mode"),
  [
    ("tiff", np.float32, "F"),
    ("tiff", np.uint16, "I;16"),
    ("tiff", np.int32, "I"),
    ("ppm", np.float32, "F"),
  ],
)
def test_pixels_without_a_defined_range_are_refused(encoding, dtype, mode):
  with pytest.raises(
    decoding.DamagedError, match=f"Pillow's mode {mode} in .* with 8 bits"
  ):
    opened(saved(GRAY.astype(dtype), encoding))


def with_orientation(value: int, encoding: str, **settings) -> bytes:
  exif = Image.Exif()
  exif[0x0112] = value
  return saved(CORNERS, encoding, exif=exif, **settings)


# One bright corner, at the right end of the first row.
CORNERS = np.zeros((16, 32, 3), np.uint8)
CORNERS[:8, 24:] = 255
# Rows and columns of the bright corner as shown, and the shape.
SHOWN = {
  1: (slice(0, 8), slice(24, 32), (16, 32)),
  2: (slice(0, 8), slice(0, 8), (16, 32)),
  3: (slice(8, 16), slice(0, 8), (16, 32)),
  4: (slice(8, 16), slice(24, 32), (16, 32)),
  5: (slice(24, 32), slice(0, 8), (32, 16)),
  6: (slice(24, 32), slice(8, 16), (32, 16)),
  7: (slice(0, 8), slice(8, 16), (32, 16)),
  8: (slice(0, 8), slice(0, 8), (32, 16)),
}
EXIF_ENCODINGS = ("jpeg", "png", "tiff", "webp")


@pytest.mark.parametrize("encoding", EXIF_ENCODINGS)
@pytest.mark.parametrize("value", SHOWN)
def test_an_image_is_turned_as_viewers_turn_it(value, encoding):
  settings = {"lossless": True} if encoding == "webp" else {}
  image = opened(with_orientation(value, encoding, **settings))
  rows, columns, shape = SHOWN[value]
  expected = np.zeros((*shape, 3), bool)
  expected[rows, columns] = True
  np.testing.assert_array_equal(image > 127, expected)


@pytest.mark.parametrize("value", [0, 9, 255])
def test_an_unknown_orientation_is_ignored(value):
  image = opened(with_orientation(value, "png"), annotated=True)
  np.testing.assert_array_equal(image, CORNERS)


def test_damaged_exif_is_ignored():
  data = saved(CORNERS, "png", exif=b"Exif\0\0II*\0\xff\xff\xff")
  np.testing.assert_array_equal(opened(data), CORNERS)


@pytest.mark.parametrize("encoding", EXIF_ENCODINGS)
@pytest.mark.parametrize("value", SHOWN)
def test_annotated_images_may_not_be_turned(value, encoding):
  data = with_orientation(value, encoding)
  if value == 1:
    assert opened(data, annotated=True).shape == (16, 32, 3)
    return
  with pytest.raises(
    decoding.DamagedError, match=f"its EXIF orientation is {value}, .*remove"
  ):
    opened(data, annotated=True)


@pytest.mark.parametrize("encoding", ["png", "tiff", "webp"])
def test_transparent_pixels_are_laid_on_white(encoding):
  pixels = np.full((2, 3, 4), (255, 0, 0, 255), np.uint8)
  pixels[:, 1, 3], pixels[:, 2, 3] = 0, 128
  settings = {"lossless": True, "exact": True} if encoding == "webp" else {}
  image = opened(saved(pixels, encoding, **settings))
  assert image[0].tolist() == [[255, 0, 0], [255, 255, 255], [255, 127, 127]]


def test_transparency_of_gray_and_of_palettes():
  gray = np.array([[[100, 255], [100, 0]]], np.uint8)
  assert opened(saved(Image.fromarray(gray, "LA"), "png"))[0].tolist() == [
    [100] * 3,
    [255] * 3,
  ]
  palette = Image.new("P", (2, 1))
  palette.putpalette([9, 0, 0, 8, 0, 0])
  palette.putpixel((1, 0), 1)
  image = opened(saved(palette, "png", transparency=1))
  assert image[0].tolist() == [[9, 0, 0], [255, 255, 255]]


@pytest.mark.parametrize("color", [0, 2])
def test_one_transparent_color_is_laid_on_white(color):
  channels = 3 if color else 1
  header, key = (2, 1, 8, color), struct.pack(">H", 9) * channels
  image = opened(png(header, bytes([9] * channels + [8] * channels), key))
  assert image[0].tolist() == [[255] * 3, [8] * 3]


def test_a_palette_that_is_missing_is_damage():
  with pytest.raises(decoding.DamagedError, match="AssertionError"):
    opened(png((2, 1, 8, 3), b"\0\1", b""))


@pytest.mark.parametrize("header", [(2, 1, 4, 0), (1, 1, 16, 0), (1, 1, 16, 2)])
def test_a_transparent_color_of_other_depths_is_refused(header):
  channels = 3 if header[3] else 1
  data = png(header, bytes(2 * channels), bytes(2 * channels))
  with pytest.raises(decoding.DamagedError, match=r"tRNS.*save it with 8 bits"):
    opened(data)


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n"


@pytest.mark.parametrize(
  "data",
  [EPS, saved(GRAY, "gif"), saved(GRAY, "ico"), saved(GRAY, "pdf")],
  ids=["eps", "gif", "ico", "pdf"],
)
def test_other_formats_are_refused(data):
  with pytest.raises(decoding.DamagedError, match=r"not an image .*JPEG, PNG"):
    opened(data)


@pytest.mark.parametrize(
  ("width", "height"), [(1, 30_000), (101, 1), (16_385, 200), (9_460, 9_460)]
)
def test_size_and_shape_are_bounded_before_decoding(width, height):
  # There are no pixels in it: decoding them would be another error.
  data = png((width, height, 1, 0), b"", b"")
  with (
    warnings.catch_warnings(),
    pytest.raises(
      decoding.DamagedError, match=f"it has {width} x {height} pixels"
    ),
  ):
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)
    opened(data)


def test_the_most_extreme_shape():
  assert opened(saved(np.zeros((1, 100), np.uint8), "png")).shape == (1, 100, 3)


def test_only_regular_files_are_read(tmp_path):
  os.mkfifo(tmp_path / "pipe.png")
  (tmp_path / "folder.png").mkdir()
  for name in ("pipe.png", "folder.png"):
    with pytest.raises(decoding.DamagedError, match="not a regular file"):
      decoding.read_file(tmp_path / name)
  (tmp_path / "link.png").symlink_to("nowhere")
  with pytest.raises(decoding.DamagedError, match="missing"):
    decoding.read_file(tmp_path / "link.png")


def test_a_file_of_terabytes_is_refused(tmp_path):
  with open(tmp_path / "sparse.png", "wb") as file:
    file.truncate(2**40)
  with pytest.raises(decoding.DamagedError, match=f"has {2**40} bytes"):
    decoding.read_file(tmp_path / "sparse.png")
