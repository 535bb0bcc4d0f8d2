"""`tenfold serve` as a client of OpenAI's API sees it."""

import os
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import tenfold
from tenfold.compression.compress import compress, recipe_for
from tenfold.models.model_card import save_compressed

openai = pytest.importorskip("openai", reason="the extra serve is not installed")
pytest.importorskip("uvicorn", reason="the extra serve is not installed")
CHAT = "{% for message in messages %}{{ message.content }} {% endfor %}"


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """Serve a compressed model; return a client, the folder, and the model in memory with its tokenizer."""
    folder = tmp_path_factory.mktemp("served") / "small"
    model, tokenizer = tenfold.load(Path(tenfold.__file__).parent / "demo", "cpu", "float32")
    model, _ = compress(model, recipe_for("low_rank", 0.9))
    tokenizer.chat_template = CHAT
    save_compressed(model, folder, tokenizer)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "tenfold", "serve", str(folder), "--port", str(port), "--device", "cpu"]
    server = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE)
    client = openai.OpenAI(base_url=f"http://localhost:{port}/v1", api_key="none", max_retries=0)
    try:
        for _ in range(120):
            assert server.poll() is None, server.stderr.read().decode()[-500:]
            try:
                client.completions.create(model=str(folder), prompt="a", max_tokens=1)
                break
            except openai.APIConnectionError:
                time.sleep(0.5)
        yield client, str(folder), model.eval(), tokenizer
    finally:
        server.terminate()
        server.wait(20)


def greedy(model, tokenizer, prompt: str, count: int) -> str:
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    return tokenizer.decode(model.generate(ids, max_new_tokens=count, do_sample=False)[0, ids.shape[1] :])


def test_completions_are_those_of_the_model_whole_streamed_and_two_at_once(served):
    client, name, model, tokenizer = served
    prompts = ["The king said", "A dog is"]
    expected = [greedy(model, tokenizer, prompt, 8) for prompt in prompts]

    def complete(prompt: str) -> str:
        return client.completions.create(model=name, prompt=prompt, max_tokens=8, temperature=0).choices[0].text

    with ThreadPoolExecutor(2) as two:
        assert list(two.map(complete, prompts)) == expected
    parts = client.completions.create(model=name, prompt=prompts[0], max_tokens=8, temperature=0, stream=True)
    assert "".join(part.choices[0].text for part in parts if part.choices) == expected[0]


def test_chat_is_that_of_the_model_with_its_template(served):
    client, name, model, tokenizer = served
    messages = [{"role": "user", "content": "The king said"}]
    answer = client.chat.completions.create(model=name, messages=messages, max_tokens=6, temperature=0)
    prompt = tokenizer.apply_chat_template(messages, tokenize=False)
    assert answer.choices[0].message.content.strip() == greedy(model, tokenizer, prompt, 6).strip()
