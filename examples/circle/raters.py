"""Simulated people ask a served model, see two responses, and vote for the better one.

The gold score of the shipped world tells them which it is; with probability --wrong they take one for the other. All goes
through the HTTP interface of `rlhf serve`.
"""

import argparse
import os
import random
from concurrent.futures import ThreadPoolExecutor

import httpx2

import reward_data
from reward_data.gold import gold_score, refuses

PAIRS_OF_A_PERSON = 20
RATINGS = [(0.5, "significantly"), (0.25, "better"), (0.1, "slightly"), (0.0, "negligibly")]


def questions(skip: int) -> list[reward_data.Preference]:
    """The prompts of the shipped preferences from row `skip` on, each once."""
    rows = reward_data.load("preferences", reward_data.Source("shipped", split="train")).rows[skip:]
    return list({reward_data.normalised_prompt(row.prompt): row for row in rows}.values())


def rate(question: reward_data.Preference, responses: list[str], wrong: bool, coin: float = 0.5) -> dict:
    """Chosen, rating and labels of two responses; `coin`, from 0 to 1, decides between equal ones."""
    seen = responses[::-1] if wrong else responses
    scores = [gold_score(question.prompt[-1].content, response) for response in seen]
    labels = {}
    if question.tag == "safety":
        safe = refuses(seen)
        labels = {place: ["safe" if ok else "unsafe"] for place, ok in zip(("first", "second"), safe, strict=True)}
    difference = abs(scores[0] - scores[1])
    rating = next(name for least, name in RATINGS if difference >= least)
    first = scores[0] > scores[1] or (scores[0] == scores[1] and coin < 0.5)
    return {"chosen": "first" if first else "second", "rating": rating, "labels": labels}


def person(http: httpx2.Client, number: int, asks: list[reward_data.Preference], votes: int, wrong: float) -> int:
    """Votes of one person, as many as that if the questions suffice."""
    luck, voted = random.Random(number), 0
    for question in asks:
        if voted == votes:
            break
        messages = [{"role": turn.role, "content": turn.content} for turn in question.prompt]
        asked = {
            "messages": messages,
            "n": 2,
            "max_tokens": 48,
            "seed": luck.getrandbits(32),
            "user": f"person-{number}",
        }
        answer = http.post("/v1/chat/completions", json=asked).raise_for_status().json()
        first, second = (choice["message"]["content"] for choice in answer["choices"])
        if first == second:  # nothing to choose
            continue
        vote = rate(question, [first, second], luck.random() < wrong, luck.random())
        about = {"first": f"{answer['id']}:0", "second": f"{answer['id']}:1", "user": f"person-{number}"}
        http.post("/v1/votes", json=about | vote).raise_for_status()
        voted += 1
    return voted


def main(url: str, pairs: int, wrong: float, skip: int) -> int:
    """The number of votes; 16 people vote at a time."""
    asks, people = questions(skip), -(-pairs // PAIRS_OF_A_PERSON)
    headers = {"Authorization": f"Bearer {os.environ['RLHF_SERVE_TOKEN']}"}
    with httpx2.Client(base_url=url, headers=headers, timeout=300) as http, ThreadPoolExecutor(16) as pool:

        def votes_of(number: int) -> int:
            least = min(PAIRS_OF_A_PERSON, pairs - number * PAIRS_OF_A_PERSON)
            return person(http, number, asks[number::people], least, wrong)

        return sum(pool.map(votes_of, range(people)))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--pairs", type=int, default=1000)
    parser.add_argument("--wrong", type=float, default=0.15, help="how often a person takes one response for the other")
    parser.add_argument("--skip", type=int, default=0, help="shipped preferences whose prompts are not asked")
    args = parser.parse_args()
    print(f"votes: {main(args.url, args.pairs, args.wrong, args.skip)}")
