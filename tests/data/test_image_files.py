import errno
import os

import numpy as np
import pytest
from PIL import Image

from ssod_imwa.data.image_files import image_paths, image_size, read_image
from ssod_imwa.errors import DataError


def test_what_systems_leave_behind_is_no_image_wherever_it_lies(tmp_path, caplog):
    caplog.set_level("INFO")
    names = ["a/1.png", "a/b/2.JPG", "a/._1.png", ".ipynb_checkpoints/1.png", "a/__MACOSX/1.png"]
    names += ["a/b/.hidden/3.png", "Thumbs.db", "notes.txt"]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "folder.jpg").mkdir()
    (tmp_path / "folder.jpg" / "4.png").touch()
    relative = [path.relative_to(tmp_path).as_posix() for path in image_paths(tmp_path)]
    assert relative == ["a/1.png", "a/b/2.JPG", "folder.jpg/4.png"]
    assert "left out 4 hidden files and folders" in caplog.text


def test_links_to_folders_are_followed_but_for_those_that_lead_back(tmp_path, caplog):
    top, far = tmp_path / "top", tmp_path / "far"
    for name in ("top/a/1.png", "far/2.png", "far/b/3.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (top / "link").symlink_to(far)
    (far / "self").symlink_to(far / "self")  # of a loop Linux says that it leads nowhere
    for number, target in enumerate((top, tmp_path, far)):
        (far / "b" / str(number)).symlink_to(target)
    (top / "a" / "here").symlink_to(".")
    relative = [path.relative_to(top).as_posix() for path in image_paths(top)]
    assert relative == ["a/1.png", "link/2.png", "link/b/3.png"]
    assert "left out 4 links that lead back to a folder above them" in caplog.text


def test_images_of_formats_that_are_not_read_are_counted(tmp_path, caplog):
    for name in ("a/1.png", "a/2.HEIC", "a/3.gif", "a/.4.gif", ".b/5.gif", "a/notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert image_paths(tmp_path) == [tmp_path / "a/1.png"]
    (line,) = [line for line in caplog.messages if "do not end in" in line]
    assert "left out 2 images that do not end in one of .bmp, " in line
    assert line.endswith(f".webp, such as {tmp_path}/a/2.HEIC")


def test_a_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    scan = os.scandir

    def refuse(path):
        if str(path).endswith("a"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)  # root may read everything
    with pytest.raises(DataError, match=f"folder {tmp_path}/a cannot be read .Permission denied"):
        image_paths(tmp_path)


@pytest.mark.parametrize("read", [image_size, lambda path: read_image(str(path))])
def test_a_link_that_leads_nowhere_is_an_image_that_cannot_be_read(tmp_path, read):
    link, target = tmp_path / "a.png", tmp_path / "gone.png"
    link.symlink_to(target)
    assert image_paths(tmp_path) == [link]
    with pytest.raises(DataError, match=f"image {link} is a link to {target}, which does not"):
        read(link)
    with pytest.raises(DataError, match=f"image {target} does not exist"):
        read(target)


@pytest.mark.parametrize("suffix", ["tif", "png"])
def test_the_high_byte_of_16_bits_is_read(tmp_path, suffix):
    path = tmp_path / f"x.{suffix}"
    Image.fromarray(np.full((4, 5), 200 * 256 + 7, np.uint16)).save(path)
    assert read_image(str(path)).unique().tolist() == [200]


@pytest.mark.parametrize(("dtype", "kind"), [(np.int32, "32-bit"), (np.float32, "floating-point")])
def test_32_bit_pixels_are_refused_instead_of_read_as_black(tmp_path, dtype, kind):
    path = tmp_path / "x.tif"
    Image.fromarray(np.full((4, 5), 200, dtype)).save(path)
    with pytest.raises(DataError, match=f"{kind} pixels have no defined range"):
        read_image(str(path))


def test_the_size_of_a_png_is_read_without_decoding_it(tmp_path, monkeypatch):
    path = tmp_path / "x.png"
    Image.new("RGB", (30, 20)).save(path, pnginfo=None)
    monkeypatch.setattr(Image.Image, "load", lambda image: pytest.fail("decoded"))
    assert image_size(path, whole=True) == (30, 20)


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_the_orientation_of_a_png_counts(tmp_path, orientation):
    path = tmp_path / "x.png"
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", (30, 20)).save(path, exif=exif)
    height, width = read_image(str(path)).shape[1:]
    assert image_size(path) == (width, height) == ((30, 20) if orientation < 5 else (20, 30))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("mode", ["L", "RGB", "I;16"])
@pytest.mark.parametrize("compression", ["raw", "tiff_lzw"])
def test_a_tiff_is_turned_as_a_png_is(tmp_path, orientation, mode, compression):
    values = np.arange(20).reshape(4, 5)
    gray = Image.fromarray(values.astype(np.uint8))
    image = Image.fromarray((values << 8).astype(np.uint16)) if mode == "I;16" else gray
    exif = Image.Exif()
    exif[0x0112] = orientation
    gray.save(tmp_path / "x.png", exif=exif)
    path = tmp_path / "x.tif"
    (image.convert("RGB") if mode == "RGB" else image).save(
        path, exif=exif, compression=compression
    )
    pixels = read_image(str(path))
    assert pixels.equal(read_image(str(tmp_path / "x.png")))
    assert image_size(path) == image_size(tmp_path / "x.png") == tuple(pixels.shape[:0:-1])
