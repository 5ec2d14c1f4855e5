"""`fovea ui`: what its pages show and what they refuse, asked directly, and used in a real browser."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import tarfile
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from shutil import which
from typing import Any

import numpy as np
import pytest
from starlette.testclient import TestClient

import curation
import pretrain
from curation.config import CurateConfig, EmbedConfig, IngestConfig
from curation.embed import embed
from curation.ingest.ingest import ingest
from eval import run as evaluate
from eval.config import EvaluateConfig
from eval.ui.catalog import Catalog, describe_artifact
from eval.ui.lineage import draw_lineage
from eval.ui.search import Searcher
from eval.ui.server import make_app
from infra.artifacts.artifact import Artifact, find
from infra.corpus.corpus import Corpus
from infra.corpus.embeddings import Embeddings
from pretrain.backbones.config import OpenClipBackboneConfig
from tests.conftest import SyntheticCorpora, encode_image, image_folder, picture
from tests.daemons import free_ports
from tests.test_pretrain_training import config

EVIL = '<script>alert("x")</script>'


@dataclass(frozen=True)
class Runs:
    """A root with a small run under it."""

    root: Path
    corpus: Artifact
    embeddings: Artifact
    selection: Artifact
    checkpoint: Artifact
    reports: list[Artifact]


@pytest.fixture(scope="module")
def runs(synthetic: SyntheticCorpora, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    root = tmp_path_factory.mktemp("runs")
    corpus = ingest(IngestConfig(source=str(synthetic.folder / "pool"), out=f"{root}/ingest/{{id}}"))
    embeddings = embed(EmbedConfig(corpus=corpus.url, out=f"{root}/embed/{{id}}"))
    selection = curation.run(CurateConfig(corpus=corpus.url, embeddings=embeddings.url, out=f"{root}/curate/{{id}}"))
    changes: dict[str, Any] = {"sharding": {"backend": "torch"}, "runtime": {"num_workers": 0}}
    training = config(synthetic.seed, root / "pretrain", **changes, schedule={"steps": 2, "global_batch_size": 8})
    checkpoint = pretrain.run(training.model_copy(update={"corpora": [selection.url]}))
    reports = [
        evaluate(
            EvaluateConfig(
                model={"kind": "checkpoint", "url": checkpoint.url},
                datasets={"train": synthetic.seed, "test": synthetic.test},
                tasks=[{"kind": "knn", "k": [k]}],
                pictures=4,
                out=f"{root}/evaluate/{{id}}",
            )
        )
        for k in (3, 9)
    ]
    return Runs(root, corpus, embeddings, selection, checkpoint, reports)


@pytest.fixture(scope="module")
def client(runs: Runs) -> TestClient:
    return TestClient(make_app(str(runs.root), ["localhost"]), base_url="http://localhost")


def test_all_artifacts_are_listed_and_filtered(runs: Runs, client: TestClient) -> None:
    whole = client.get("/").text
    for each in (runs.corpus, runs.embeddings, runs.selection, runs.checkpoint, *runs.reports):
        assert each.id[:12] in whole
    few = client.get("/", params={"q": "near_duplicates", "kind": "selection"}).text
    assert runs.selection.id[:12] in few
    assert runs.corpus.id[:12] not in few
    assert "0 found" in client.get("/", params={"q": "no such thing"}).text


def test_new_artifacts_appear_and_unreadable_ones_are_named(tmp_path: Path) -> None:
    catalog = Catalog(str(tmp_path))
    assert catalog.artifacts() == []
    made = ingest(IngestConfig(source=str(image_folder(tmp_path / "images", 2)), out=str(tmp_path / "a")))
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "manifest.json").write_text('{"schema": 99}')
    assert catalog.artifacts() == []  # it does not look at the storage for each page
    catalog._looked -= 10
    assert (
        describe_artifact(dataclasses.replace(made, manifest=made.manifest.model_copy(update={"kind": "selection"})))
        == ""
    )
    assert [each.id for each in catalog.artifacts()] == [made.id]
    assert catalog.unreadable() == [str(tmp_path / "b")]


def test_lineage_leads_from_a_checkpoint_to_its_shards(runs: Runs, client: TestClient) -> None:
    drawn = draw_lineage(runs.checkpoint, Catalog(str(runs.root)))
    place = {box.id: box.top for box in drawn.boxes}
    chain = [runs.corpus.manifest.inputs["source"].id, runs.corpus.id, runs.selection.id, runs.checkpoint.id]
    assert [place[id] for id in chain] == sorted(place[id] for id in chain)
    assert {each.id for each in runs.reports} <= set(place)  # made from it
    lefts = {(box.left, box.top) for box in drawn.boxes}
    assert len(lefts) == len(drawn.boxes)
    page = client.get(f"/artifacts/{runs.checkpoint.id}").text
    assert f'href="/artifacts/{runs.selection.id}"' in page
    shards = json.loads(runs.corpus.read_bytes("shards.json"))
    assert all(shard["sha256"][:16] in client.get(f"/artifacts/{runs.corpus.id}").text for shard in shards)


def test_reports_are_compared(runs: Runs, client: TestClient) -> None:
    page = client.get("/compare", params={"id": [each.id for each in runs.reports]}).text
    assert "tasks" in page
    assert "'k': [3]" in page.replace("&#39;", "'")
    assert client.get("/compare", params={"id": runs.corpus.id}).status_code == 400


def test_only_files_of_manifests_are_shown(runs: Runs, client: TestClient) -> None:
    (report, _) = runs.reports
    answer = client.get(f"/artifacts/{report.id}/page")
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    for path in ("manifest.json", "../../evaluate", "..%2f..%2fetc%2fpasswd", "knn-answers.npy"):
        assert client.get(f"/artifacts/{report.id}/files/{path}").status_code == 404, path
    assert client.get("/artifacts/0123").status_code == 404
    assert client.get("/", headers={"Host": "evil.example"}).status_code == 400
    assert client.post("/").status_code == 405


def test_images_of_a_corpus_elsewhere_are_shown(runs: Runs, tmp_path: Path) -> None:
    cut = curation.run(CurateConfig(corpus=runs.corpus.url, steps=[{"kind": "exact"}], out=str(tmp_path / "cut")))
    client = TestClient(make_app(str(tmp_path), ["testserver"]))
    page = client.get(f"/artifacts/{cut.id}/images", params={"from": "²"})
    assert page.status_code == 200
    assert client.get(f"/artifacts/{runs.corpus.id}/images/0").status_code == 200


def test_damage_is_told_and_not_shown(runs: Runs, tmp_path: Path) -> None:
    made = ingest(IngestConfig(source=str(image_folder(tmp_path / "images", 2)), out=str(tmp_path / "runs" / "a")))
    (tmp_path / "runs" / "a" / "shards.json").write_text("[]")
    answer = TestClient(make_app(str(tmp_path / "runs"), ["testserver"])).get(f"/artifacts/{made.id}")
    assert answer.status_code == 422
    assert "damaged" in answer.text


def test_images_are_shown_with_their_verdicts(runs: Runs, client: TestClient) -> None:
    page = client.get(f"/artifacts/{runs.selection.id}/images", params={"reason": "exact_duplicate"}).text
    told = runs.selection.metrics["steps"][0]["dropped"]
    assert page.count('<figure class="dropped">') == told
    key = page.partition("/explain?key=")[2].partition('"')[0]
    assert "dropped by the step exact" in client.get(f"/artifacts/{runs.selection.id}/explain?key={key}").text
    shown = client.get(f"/artifacts/{runs.corpus.id}/images/0?side=512")
    assert shown.headers["content-type"] == "image/webp"
    assert client.get(f"/artifacts/{runs.corpus.id}/images/99999999").status_code == 404


def test_what_came_from_the_web_is_escaped(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for name, data in ((f"{EVIL}.png", encode_image(picture(1))), (f"{EVIL}.txt", EVIL.encode())):
            entry = tarfile.TarInfo(name.replace("/", "∕"))
            entry.size = len(data)
            tar.addfile(entry, BytesIO(data))
    corpus = ingest(IngestConfig(source=str(tmp_path / "0.tar"), out=str(tmp_path / "runs" / "corpus")))
    assert Corpus.from_artifact(corpus).table["caption"].to_pylist() == [EVIL]
    embedded = embed(EmbedConfig(corpus=corpus.url, out=str(tmp_path / "runs" / "vectors")))
    cut = curation.run(CurateConfig(corpus=corpus.url, steps=[{"kind": "exact"}], out=str(tmp_path / "runs" / "cut")))
    key = Corpus.from_artifact(corpus).key(0)
    client = TestClient(make_app(str(tmp_path / "runs"), ["testserver"]))
    addresses = (
        *("/", f"/artifacts/{corpus.id}", f"/artifacts/{corpus.id}/images", f"/artifacts/{cut.id}/images"),
        *(f"/search?key={key}", f"/search?in={embedded.id}&text={EVIL}", f"/?q={EVIL}", f"/artifacts/{EVIL}"),
        *(f"/artifacts/{cut.id}/explain?key={key}", f"/artifacts/{corpus.id}/images?key={EVIL}"),
    )
    for address in addresses:
        assert "<script" not in client.get(address).text, address


def test_search_finds_what_brute_force_finds(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("eval.ui.search._BLOCK", 7)  # several blocks
    searcher = Searcher(runs.embeddings)
    vectors = np.array(Embeddings.from_artifact(runs.embeddings).vectors.take(np.arange(len(searcher.corpus)))).astype(
        np.float32
    )
    for row in (0, 11, len(vectors) - 1):
        scores = vectors @ vectors[row]
        hits = searcher.search_by_row(row, 20)
        assert [hit.score for hit in hits] == pytest.approx(np.sort(scores)[::-1][:20], abs=1e-5)
        assert [scores[hit.row] for hit in hits] == pytest.approx([hit.score for hit in hits], abs=1e-5)


def test_an_image_finds_itself_and_a_broken_one_is_refused(runs: Runs, client: TestClient) -> None:
    corpus = Corpus.from_artifact(runs.corpus)
    data = corpus.read_image(5)
    page = client.post("/search", files={"image": ("a.png", data)}).text
    first = page.partition("<figcaption>")[2].partition("</figcaption>")[0]
    assert first.split()[0] == "1.000"
    assert corpus.key(5) in page
    broken = client.post("/search", files={"image": ("a.png", b"no image")})
    assert broken.status_code == 422
    assert "give a JPEG, PNG or WebP file" in broken.text
    assert client.post("/search", data={"image": "text"}).status_code == 400
    strange = {"Sec-Fetch-Site": "cross-site"}
    assert client.post("/search", files={"image": ("a.png", data)}, headers=strange).status_code == 403
    assert client.post("/search", files={"image": ("a.png", bytes(1 << 25))}).status_code == 413


def test_a_text_is_compared_with_images_by_a_clip_model(clip: OpenClipBackboneConfig, tmp_path: Path) -> None:
    import open_clip
    import torch

    corpus = ingest(IngestConfig(source=str(image_folder(tmp_path / "images", 9)), out=str(tmp_path / "runs" / "a")))
    vectors = embed(EmbedConfig(corpus=corpus.url, backbone=clip, out=str(tmp_path / "runs" / "b")))
    client = TestClient(make_app(str(tmp_path / "runs"), ["testserver"]))
    page = client.get("/search", params={"text": "a soft blob"}).text
    found = [each.partition("</figcaption>")[0].split()[1] for each in page.split("<figcaption>")[1:]]
    model = open_clip.create_model("tiny-clip", pretrained=clip.checkpoint)
    with torch.inference_mode():
        text = model.encode_text(open_clip.get_tokenizer("tiny-clip")(["a soft blob"]), normalize=True)[0].numpy()
    images = np.array(Embeddings.from_artifact(vectors).vectors.take(np.arange(9))).astype(np.float32)
    keys = Corpus.from_artifact(corpus).keys
    assert found == [keys[row] for row in np.argsort(-(images @ text), kind="stable")]
    pixels = client.get("/search", params={"in": embed_pixels(corpus, tmp_path), "text": "a soft blob"})
    assert pixels.status_code == 422
    assert "no text tower" in pixels.text


def test_another_backbone_in_the_place_is_noticed(clip: OpenClipBackboneConfig, tmp_path: Path) -> None:
    import open_clip
    import torch

    corpus = ingest(IngestConfig(source=str(image_folder(tmp_path / "images", 3)), out=str(tmp_path / "runs" / "a")))
    embed(EmbedConfig(corpus=corpus.url, backbone=clip, out=str(tmp_path / "runs" / "b")))
    torch.save(open_clip.create_model("tiny-clip").state_dict(), clip.checkpoint)
    client = TestClient(make_app(str(tmp_path / "runs"), ["testserver"]))
    told = client.get("/search", params={"text": "a blob"})
    assert told.status_code == 422
    assert "its backbone is no longer what it was" in told.text


def embed_pixels(corpus: Artifact, tmp_path: Path) -> str:
    made = embed(EmbedConfig(corpus=corpus.url, out=str(tmp_path / "runs" / "c")))
    time.sleep(5)  # until it looks again
    return made.id


needs_browser = pytest.mark.skipif(
    which("chromium") is None or which("chromedriver") is None,
    reason="no browser here: install Debian's chromium and chromium-driver",
)


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Any]:
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = which("chromium") or ""
    for switch in (
        *("headless", "no-sandbox", "disable-gpu", "no-first-run", "disable-background-networking"),
        *("disable-component-update", "disable-sync", "window-size=1300,1000", f"user-data-dir={tmp_path / 'profile'}"),
    ):
        options.add_argument(f"--{switch}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(which("chromedriver")))
    driver.set_page_load_timeout(60)
    yield driver
    driver.quit()


@pytest.fixture
def address(runs: Runs) -> Iterator[str]:
    (port,) = free_ports(1)
    command = [str(Path(sys.executable).with_name("fovea")), "ui", str(runs.root), "--port", str(port)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + 120
    while True:
        try:
            urllib.request.urlopen(url, timeout=30).close()
            break
        except OSError:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.3)
    yield url
    process.terminate()
    process.wait(30)


@needs_browser
@pytest.mark.browser
def test_somebody_walks_through_the_runs(runs: Runs, browser: Any, address: str, tmp_path: Path) -> None:
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support import expected_conditions
    from selenium.webdriver.support.ui import Select, WebDriverWait

    def click(selector: str) -> None:
        """Follow a link or send a form, to the page that it leads to."""
        found = browser.find_element(By.CSS_SELECTOR, selector)
        found.click()
        WebDriverWait(browser, 60).until(expected_conditions.staleness_of(found))

    browser.get(address)
    browser.find_element(By.NAME, "q").send_keys("knn")
    Select(browser.find_element(By.NAME, "kind")).select_by_visible_text("report")
    click("form.asks button")
    boxes = browser.find_elements(By.CSS_SELECTOR, "input[type=checkbox]")
    assert len(boxes) == 2
    for box in boxes:
        box.click()
    click("form[action='/compare'] button")
    assert browser.find_element(By.TAG_NAME, "h1").text == "2 artifacts side by side"
    assert browser.find_elements(By.CSS_SELECTOR, "tr.differ")

    browser.get(f"{address}/artifacts/{runs.checkpoint.id}")  # and from box to box to the shards
    for artifact in (runs.selection, runs.corpus):
        click(f"#lineage a[href='/artifacts/{artifact.id}']")
        assert artifact.id[:12] in browser.title
    assert browser.find_element(By.XPATH, "//h2[text()='Shards']").is_displayed()
    click("nav a[href$='/images']")
    loaded = "return [...document.images].every(each => each.complete && each.naturalWidth > 0)"
    assert browser.execute_script("window.scrollTo(0, document.body.scrollHeight); return document.images.length") > 50

    (tmp_path / "query.png").write_bytes(Corpus.from_artifact(runs.corpus).read_image(3))
    browser.get(f"{address}/search")
    browser.find_element(By.CSS_SELECTOR, "input[type=file]").send_keys(str(tmp_path / "query.png"))
    click("form[method=post] button")
    first = browser.find_element(By.CSS_SELECTOR, "#hits figcaption").text
    assert first.startswith("1.000")
    deadline = time.monotonic() + 30
    while not browser.execute_script(loaded.replace("document.images", "[...document.images].slice(0, 10)")):
        assert time.monotonic() < deadline
        time.sleep(0.2)
    browser.get(f"{address}/artifacts/{runs.reports[0].id}/page")
    assert "Evaluation of" in browser.title
    complaints = [entry["message"] for entry in browser.get_log("browser") if "favicon" not in entry["message"]]
    assert complaints == []  # no policy is broken, nothing is missing


def test_an_address_without_runs_is_one_line(tmp_path: Path) -> None:
    command = [str(Path(sys.executable).with_name("fovea")), "ui", str(tmp_path / "nowhere")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("fovea: ")
    assert "nowhere: not found" in done.stderr
    assert find(str(tmp_path / "nowhere")) is None
