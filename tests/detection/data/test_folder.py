import pytest

from ssod_imwa.data.image_files import image_size
from ssod_imwa.detection.data.folder import load_folder
from ssod_imwa.errors import DataError


def test_images_of_all_subfolders_in_the_order_of_their_paths(tmp_path, write_image):
    for name in ("b.JPG", "a/z.png", "a.png"):
        write_image(tmp_path / name, width=20, height=10)
    (tmp_path / "notes.txt").write_text("no image")
    dataset = load_folder(tmp_path, name="photos")
    assert [record.image_id for record in dataset.records] == ["a.png", "a/z.png", "b.JPG"]
    assert {(r.width, r.height, r.annotations) for r in dataset.records} == {(20, 10, None)}


def test_a_file_that_is_no_image_is_collected_or_raised(tmp_path, write_image):
    write_image(tmp_path / "good.png")
    (tmp_path / "bad.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"bad\.png.*no image"):
        load_folder(tmp_path, name="photos")
    problems = []
    assert len(load_folder(tmp_path, name="photos", problems=problems)) == 1
    assert [problem.place for problem in problems] == ["image bad.png"]


def test_missing_folder_and_missing_image(tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        load_folder(tmp_path / "none", name="none")
    with pytest.raises(DataError, match="does not exist"):
        image_size(tmp_path / "none.png")


def test_size_is_that_of_the_upright_image(tmp_path):
    from PIL import Image

    image = Image.new("RGB", (20, 10))
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(tmp_path / "turned.jpg", exif=exif)
    assert image_size(tmp_path / "turned.jpg") == (10, 20)
