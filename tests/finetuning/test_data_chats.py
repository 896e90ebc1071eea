"""Chats: `messages` and LLaVA's `conversations`, in JSON lines and in one JSON list."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from drawn_data import draw, draw_jsonl, write_lines

from weightport.errors import DataError
from weightport.finetuning.data import DataSettings, EntrySamples, open_data
from weightport.finetuning.data import records as records_module

PLAIN = DataSettings()
ALONE = DataSettings(turns="alone")


def user(text: Any) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: Any, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


TURNS = [user("<image>\nWhat is it?"), assistant("A cat."), user("Its colour?"), assistant("Red.")]


def opened(folder: Path, row: Any, settings: DataSettings = PLAIN) -> EntrySamples:
    draw_jsonl(folder, 2)
    return open_data(write_lines(folder / "chat.jsonl", [row]), settings)


def said(samples: EntrySamples) -> list[tuple[str, str, tuple[tuple[str, str], ...]]]:
    return [(sample.prefix, sample.suffix, sample.history) for sample in (samples[i] for i in range(len(samples)))]


def test_every_answer_of_a_chat_is_a_sample_with_what_was_said_before(tmp_path: Path) -> None:
    samples = opened(tmp_path, {"messages": TURNS, "images": ["1.png"]})
    assert said(samples) == [
        ("What is it?", "A cat.", ()),
        ("Its colour?", "Red.", (("What is it?", "A cat."),)),
    ]
    picture = samples[1].picture
    assert picture is not None and picture.read().tobytes() == draw(1).tobytes()
    assert samples[1].place == f"{tmp_path}/chat.jsonl, line 1, answer 2"
    assert said(opened(tmp_path, {"messages": TURNS, "images": ["1.png"]}, ALONE))[1] == ("Its colour?", "Red.", ())


def test_llavas_conversations_are_the_same_chat(tmp_path: Path) -> None:
    turns = [{"from": {"user": "human", "assistant": "gpt"}[each["role"]], "value": each["content"]} for each in TURNS]
    assert said(opened(tmp_path, {"id": "7", "image": "1.png", "conversations": turns})) == said(
        opened(tmp_path, {"messages": TURNS, "image": "1.png"})
    )


def test_parts_of_a_message_name_the_picture_where_they_stand(tmp_path: Path) -> None:
    for part in (
        {"type": "image", "image": "1.png"},
        {"type": "image", "path": "1.png"},
        {"type": "image_url", "image_url": {"url": "1.png"}},
    ):
        text = {"type": "text", "text": "What?"}
        samples = opened(tmp_path, {"messages": [user([part, text]), assistant([{"type": "text", "text": "A cat"}])]})
        assert said(samples) == [("What?", "A cat", ())]
        assert samples[0].picture is not None and samples[0].picture.key == "1.png"


@pytest.mark.parametrize("mark", [{"weight": 0}, {"loss": False}, {"training": False}, {"train": False}])
def test_an_answer_that_is_marked_as_context_is_read_and_not_learned(tmp_path: Path, mark: dict[str, Any]) -> None:
    turns = [TURNS[0], assistant("A cat.", **mark), *TURNS[2:]]
    samples = opened(tmp_path, {"messages": turns, "image": "1.png"})
    assert said(samples) == [("Its colour?", "Red.", (("What is it?", "A cat."),))]


def test_a_row_of_columns_may_list_its_one_picture(tmp_path: Path) -> None:
    samples = opened(tmp_path, {"query": "what?", "response": "a cat", "images": ["1.png"]})
    assert said(samples) == [("what?", "a cat", ())]
    with pytest.raises(DataError, match=r"line 1: 2 pictures\. One a sample was expected"):
        opened(tmp_path, {"query": "what?", "response": "a cat", "images": ["1.png", "0.png"]})


def test_system_messages_are_left_out_where_that_is_said(tmp_path: Path) -> None:
    row = {"messages": [{"role": "system", "content": "Be kind."}, *TURNS], "image": "1.png"}
    assert len(opened(tmp_path, row, DataSettings(drop_system=True))) == 2


def test_an_empty_system_message_is_left_out(tmp_path: Path) -> None:
    row = {"messages": [{"role": "system", "content": " "}, *TURNS], "image": "1.png"}
    assert len(opened(tmp_path, row)) == 2


BAD: list[tuple[Any, str]] = [
    ([], "a list of messages was expected, found none"),
    ("hello", "a list of messages was expected, found a text"),
    ([{"role": "system", "content": "Be kind."}, *TURNS], "message 1: a system message, which no prompt here holds"),
    (
        [user("a"), user("b"), assistant("c")],
        "message 2: the role of an answer was expected, found that of a question",
    ),
    ([assistant("a")], "message 1: the role of a question was expected, found that of an answer"),
    ([user("a"), assistant("b"), user("c")], "the chat ends with a question"),
    ([user("a"), {"role": "tool", "content": "b"}], "message 2: the role 'tool' is not known. Expected: user, human"),
    ([user("a"), {"content": "b"}], "message 2: no role. Found: content"),
    ([user("a"), "b"], "message 2: an object with role and content was expected, found a text"),
    ([user("a"), assistant(" ")], "message 2: an empty answer"),
    ([user("a"), assistant(None)], "message 2: 'content' holds null where a text was expected"),
    ([user("a"), assistant("b", loss=False)], "no answer of this chat is to be learned"),
    ([user("<image><image>a"), assistant("b")], "message 1: 2 pictures. One a sample was expected"),
    ([*TURNS, user("<image>"), assistant("b")], "message 5: a picture in the middle of a chat"),
    ([user([{"type": "video", "video": "a.mp4"}]), assistant("b")], "message 1: a part of the type 'video'"),
    (
        [user([{"type": "image_url", "image_url": {"url": "https://a.b/c.png"}}]), assistant("b")],
        "2 pictures. One a sample",
    ),
]


@pytest.mark.parametrize(("messages", "reason"), BAD, ids=[reason for _, reason in BAD])
def test_a_bad_chat_is_named_with_its_line_and_message_or_skipped(tmp_path: Path, messages: Any, reason: str) -> None:
    draw_jsonl(tmp_path, 2)
    good = {"messages": TURNS, "image": "1.png"}
    path = write_lines(tmp_path / "chat.jsonl", [good, {"messages": messages, "image": "1.png"}, good])
    with pytest.raises(DataError, match=rf"chat\.jsonl, line 2.*{reason}"):
        open_data(path, PLAIN)
    assert len(open_data(path, DataSettings(skip_bad=1))) == 4


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"messages": TURNS, "images": ["0.png", "1.png"]}, "2 pictures. One a sample was expected"),
        ({"messages": TURNS}, "<image> stands for a picture, and none is named"),
        ({"messages": TURNS[2:]}, "the name of an image was expected, found null.*data.text_only=true"),
        ({"messages": TURNS, "image": "https://example.org/1.png"}, r"is a URL \(https://\)\. Pictures are read from"),
        ({"messages": TURNS, "image": "data:image/png;base64,AAAA"}, r"is a URL \(data:\)"),
        ({"messages": TURNS, "images": [5]}, "'images' holds a number where the name of an image was expected"),
    ],
)
def test_a_chat_has_one_picture_in_a_file(tmp_path: Path, row: dict[str, Any], reason: str) -> None:
    with pytest.raises(DataError, match=f"chat.jsonl, line 1: .*{reason}"):
        opened(tmp_path, row)


def test_a_json_list_is_read_in_pieces_that_end_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw_jsonl(tmp_path, 2)
    rows = [{"image": "1.png", "prefix": f"颜色 {n}", "suffix": f'"{n}"' + "é" * (n % 7)} for n in range(40)]
    path = tmp_path / "list.json"
    expected = [(row["prefix"], row["suffix"], ()) for row in rows]
    for indent in (None, 2):
        path.write_text("\ufeff " + json.dumps(rows, ensure_ascii=False, indent=indent) + "\n", "utf-8")
        for size in (1, 7, 2**20):
            monkeypatch.setattr(records_module, "CHUNK", size)
            samples = open_data(path, PLAIN)
            assert said(samples) == expected
    assert samples[1].place == f"{path}, line 7 (object 2)"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[]", "is empty. A JSON list of objects was expected"),
        ('[{"image": "1.png", "suffix": "a"} {"image"', "line 1, after 1 objects: broken JSON: a comma or the end"),
        (
            '[{"image": "1.png", "suffix": "a"},\n]',
            "line 2, after 1 objects: .*an object was expected behind the comma",
        ),
        ('[{"image": "1.png", "suffix": "a"}\n', "line 2, after 1 objects: .*a comma or the end of the list"),
        ('[{"image": "1.png", "suffix": "a"}] x', "line 1, after 1 objects: .*nothing was expected behind the list"),
        ('[{"image": "1.png", "suffix": "a"},\n{"image', "line 2, after 1 objects: broken JSON: Unterminated string"),
        ('[{"image": "1.png", "suffix": "a"}, 5]', r"line 1 \(object 2\): a JSON object was expected, found a number"),
    ],
)
def test_a_broken_json_list_is_named_with_its_line(tmp_path: Path, text: str, reason: str) -> None:
    draw_jsonl(tmp_path, 2)
    (tmp_path / "list.json").write_text(text)
    with pytest.raises(DataError, match=f"(?s)list.json.*{reason}"):
        open_data(tmp_path / "list.json", PLAIN)
