"""A few rows of every suite in its official format, made here, and real rows of `shared/data` brought back into the
official formats that they came from."""

import json
import os
from pathlib import Path

import pytest
from tiny import assistant, user

from grm_hf.evaluation.rewardbench import LANGUAGES, SUBSETS
from grm_hf.metrics import REWARDBENCH


# Beside the repository, or where GRM_DATA says.
DATA = Path(os.environ.get("GRM_DATA") or Path(__file__).resolve().parents[2] / "shared" / "data")
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="the real rows (shared/data) are not here")


def pair(number, subset, name="subset"):
    return {
        "prompt": f"prompt {number}", "chosen": f"good {number}", "chosen_model": "a", "rejected": f"bad {number}",
        "rejected_model": "b", name: subset, "id": number,
    }


def rewardbench(count=1):
    return {"filtered.jsonl": [pair(i, name) for i, name in enumerate(SUBSETS * count)]}


def rewardbench2():
    rows = [
        {"id": str(i), "prompt": f"prompt {i}", "chosen": ["good"], "rejected": ["bad", "worse", "worst"],
         "num_correct": 1, "num_incorrect": 3, "total_completions": 4, "models": ["m"] * 4, "subset": subset}
        for i, subset in enumerate(["Factuality", "Precise IF", "Math", "Safety", "Focus"])
    ]
    for number in range(2):
        for kind, right in (("ref", ["red"]), ("tied", ["red", "green", "blue"])):
            rows.append({"id": f"{kind}:{number}", "prompt": f"{kind} {number}?", "chosen": right,
                         "rejected": ["table", "chair"], "num_correct": len(right), "num_incorrect": 2,
                         "total_completions": len(right) + 2, "models": [], "subset": "Ties"})
    return {"test.jsonl": rows}


def rm_bench():
    return {
        "total_dataset.json": [
            {"id": i, "prompt": f"prompt {domain}", "chosen": [f"good {s}" for s in range(3)],
             "rejected": [f"bad {s}" for s in range(3)], "domain": domain}
            for i, domain in enumerate(["chat", "code", "math", "safety-refuse", "safety-response"])
        ]
    }


def ppe():
    files = {
        "human.jsonl": [
            {"question_id": f"q{i}", "model_a": "a", "model_b": "b", "winner": winner, "prompt": f"prompt {i}",
             "response_1": "one", "response_2": "two", "language": "English"}
            for i, winner in enumerate(["model_a", "model_b", "tie (bothbad)"])
        ]
    }
    for name in ("MMLU-Pro", "MATH", "GPQA", "IFEval", "MBPP-Plus"):
        files[f"PPE-{name}-Best-of-K.jsonl"] = [
            {"question_id": i, "model_name": "m", "prompt": f"{name} {i}", "scores": [1, 0, 1, 0],
             "sampled_conflict_pairs": [[0, 1], [3, 2]], **{f"response_{k}": f"answer {k} {i}" for k in range(1, 5)}}
            for i in range(2)
        ]
    return files


def judgebench():
    sources = ["mmlu-pro-law", "livebench-reasoning", "livebench-math", "livecodebench"]
    return {
        "gpt.jsonl": [
            {"pair_id": f"p{i}", "original_id": "o", "source": source, "question": f"question {i}",
             "response_model": "gpt-4o", "response_A": "yes", "response_B": "no", "label": "A>B" if i % 2 else "B>A"}
            for i, source in enumerate(sources)
        ]
    }


def rmb():
    files = {}
    for goal, scenario in (("Helpfulness", "Chat/Discussion"), ("Harmlessness", "S1")):
        common = {"conversation_input": [{**user(f"{goal}?"), "language": "English"}]}
        files[f"Pairwise_set/{goal}/{scenario}.json"] = [
            {"pair_uid": f"{goal}1", **common, "chosen": {"llm_name": "a", "answer": "yes"},
             "reject": {"llm_name": "b", "answer": "no"}, "category_path": f"Pairwise_set/{goal}/{scenario}"}
        ]
        files[f"BoN_set/{goal}/{scenario}.json"] = [
            {"bon_uid": f"{goal}1", **common, "bon_best": {"llm_name": "a", "answer": "yes"},
             "loser_list": [{"llm_name": "b", "answer": "no"}, {"llm_name": "c", "answer": ""}],
             "category_path": f"BoN_set/{goal}/{scenario}"}
        ]
    return files


def rewardmath():
    return {
        "RewardMATH_direct.json": [
            {"problem": f"problem {p}", "answer": "4", "eval_solution": [f"step {p}", f"so {p + k}"],
             "solution_reference": "human_to_GPT-4" if k == 0 else f"model {k}",
             "solution_type": "chosen" if k == 0 else "rejected", "problem_id": p, "id": 10 * p + k}
            for p in range(3)
            for k in range(10)
        ]
    }


def m_rewardbench():
    files = {"eng_Latn.jsonl": [pair(i, subset) for i, subset in enumerate(SUBSETS)]}
    for language in LANGUAGES[:2]:
        files[f"{language}.jsonl"] = [pair(i, subset, "source") for i, subset in enumerate(SUBSETS)]
        for row in files[f"{language}.jsonl"]:
            row["prompt"] = f"{language} {row['prompt']}"
    return files


def if_rewardbench():
    edges = [{"chosen": {"response_id": a}, "rejected": {"response_id": b}} for a, b in ((0, 1), (1, 2), (0, 2))]
    return {
        "if_rewardbench.json": [
            {"id": i, "response_generation_model": "m", "instruction_type": kind, "messages": messages,
             "checklist": ["c"], "responses": [{"response_id": k, "response": f"answer {k}"} for k in range(3)],
             "preference_graph": edges}
            for i, (kind, messages) in enumerate(
                [("Single_Turn", [user("hi")]), ("Multi_Turn", [user("hi"), assistant("yes"), user("and?")]),
                 ("System_Prompt", [{"role": "system", "content": "be brief"}, user("hi")])]
            )
        ]
    }


def contrast():
    return {
        f"{task}_contrast.json": [
            {"query": f"query {i}", "retrieval": f"retrieval {i}", "query_response_k": f"first {i}",
             "query_response_j": "x", "retrieval_response_k": f"second {i}", "retrieval_response_j": "y"}
            for i in range(2)
        ]
        for task in ("stack", "wmt", "para", "sum")
    }


def unified_feedback():
    ratings = [(1.0, 0.0), (2.0, 5.0), (1.0, 1.0)]
    return {
        "val.jsonl": [
            {"id": str(i), "conv_A": [user(f"post {i} "), assistant("short")],
             "conv_B": [user(f"post {i} "), assistant("long")], "conv_A_rating": a, "conv_B_rating": b,
             "num_turns": 1, "source": "openai/summarize_from_feedback(comparisons)" if i else "Anthropic/hh-rlhf"}
            for i, (a, b) in enumerate(ratings)
        ]
    }


def hhh():
    texts = ["Is it?", "What is it?\n\nAssistant: A dog.\n\nHuman: Sure?"]
    return {
        f"{subset}.jsonl": [
            {"input": f"{text} ({subset})", "targets": {"choices": ["yes", "no"], "labels": [i, 1 - i]}}
            for i, text in enumerate(texts)
        ]
        for subset in ("harmless", "helpful", "honest", "other")
    }


def mt_bench():
    rows = [
        {"question_id": 80 + i, "model_a": "a", "model_b": "b", "winner": winner, "judge": "j", "turn": 2,
         "conversation_a": [user("one"), assistant(f"a {i}"), user("two"), assistant("more")],
         "conversation_b": [user("one"), assistant(f"b {i}"), user("two"), assistant("less")]}
        for i, winner in enumerate(["model_a", "model_b", "tie"])
    ]
    return {"human.jsonl": rows, "gpt4_pair.jsonl": rows}


def own():
    return {
        "my_pairs.jsonl": [
            {"prompt": [user("Hi")], "chosen": [assistant("Hello")], "rejected": [assistant("No")]},
            {"prompt": "What is 2 + 2?", "chosen": " 4", "rejected": " 5"},
            {"prompt": [user("Hi")], "chosen": ["Hello"], "rejected": ["No", "Go away"]},
        ]
    }


FILES = {
    "rewardbench": rewardbench, "rewardbench2": rewardbench2, "rm-bench": rm_bench, "ppe": ppe,
    "judgebench": judgebench, "rmb": rmb, "rewardmath": rewardmath, "m-rewardbench": m_rewardbench,
    "if-rewardbench": if_rewardbench, "contrast": contrast, "unified-feedback": unified_feedback, "hhh": hhh,
    "mt-bench": mt_bench, "own": own,
}


def write(folder, files):
    """Write files of rows below a folder; returns the folder."""
    for name, rows in files.items():
        path = Path(folder) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".jsonl":
            path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        else:
            path.write_text(json.dumps(rows), encoding="utf-8")
    return folder


# ----------------------------------------------------------------------------------------------------------- real rows


def table(name):
    import pyarrow.parquet as parquet

    rows = parquet.read_table(DATA / f"{name}.parquet").to_pylist()
    return [{**row, "meta": json.loads(row["meta"])} for row in rows]


def _first(messages):
    return messages[0]["content"]


def real_rm_bench():
    items, files = {}, {}
    for row in table("rm_bench"):
        item = items.setdefault(row["meta"]["item_id"], {"subset": row["subset"], "prompt": _first(row["prompt"])})
        for side in ("chosen", "rejected"):
            item.setdefault(side, [None] * 3)[row["meta"][f"{side}_style"]] = _first(row[side])
    for number, item in enumerate(items.values()):
        domain = item.pop("subset")
        files.setdefault(f"{domain}_filtered.json", []).append({"id": number, **item})
    return files


def real_rmb():
    files = {}
    for kind, name in (("Pairwise_set", "rmb_pairwise_eval"), ("BoN_set", "rmb_bon")):
        for number, row in enumerate(table(name)):
            models, path = row["meta"], f"{kind}/{row['subset']}"
            if kind == "Pairwise_set":
                item = {
                    "pair_uid": models["pair_uid"],
                    "chosen": {"llm_name": models["chosen_model"], "answer": _first(row["chosen"])},
                    "reject": {"llm_name": models["rejected_model"], "answer": _first(row["rejected"])},
                }
            else:
                losers = zip(models["rejected_models"], row["rejected_list"], strict=True)
                item = {
                    "bon_uid": str(number),
                    "bon_best": {"llm_name": models["chosen_model"], "answer": _first(row["chosen"])},
                    "loser_list": [{"llm_name": llm, "answer": _first(text)} for llm, text in losers],
                }
            conversation = [{**message, "language": "English"} for message in row["prompt"]]
            files.setdefault(f"{path}.json", []).append(
                {"conversation_input": conversation, "category_path": path, **item}
            )
    return files


def real_hhh():
    files = {}
    for row in table("hhh_alignment"):
        marks = {"user": "\n\nHuman: ", "assistant": "\n\nAssistant: "}
        text = "".join(marks[m["role"]] + m["content"] for m in row["prompt"]).removeprefix(marks["user"])
        targets = {"choices": [_first(row["chosen"]), _first(row["rejected"])], "labels": [1, 0]}
        files.setdefault(f"{row['subset']}.jsonl", []).append({"input": text, "targets": targets})
    return files


def real_contrast():
    from grm_hf.evaluation.contrast import PREFIXES

    items, files = {}, {}
    for row in table("contrast_instructions"):
        task, side = row["subset"], row["meta"]["side"]
        other = "retrieval" if side == "query" else "query"
        item = items.setdefault((task, row["meta"]["row"]), {"query_response_j": "", "retrieval_response_j": ""})
        item[side] = _first(row["prompt"]).removeprefix(PREFIXES[task])
        item[f"{side}_response_k"], item[f"{other}_response_k"] = _first(row["chosen"]), _first(row["rejected"])
    for (task, _), item in items.items():
        if {"query", "retrieval"} <= set(item):
            files.setdefault(f"{task}_contrast.json", []).append(item)
    return files


def real_gsm8k():
    """Right and wrong solutions of GSM8K in the format of RewardMATH, whose rows are of this kind."""
    rows = []
    for number, row in enumerate(table("gsm8k_solutions")):
        for place, (kind, side) in enumerate((("chosen", "chosen"), ("rejected", "rejected"))):
            rows.append({"problem": _first(row["prompt"]), "eval_solution": _first(row[side]).split("\n"),
                         "solution_type": kind, "problem_id": number, "id": 10 * number + place})
    return {"RewardMATH_direct.json": rows}


REAL = {
    "rm-bench": real_rm_bench,
    "rmb": real_rmb,
    "hhh": real_hhh,
    "contrast": real_contrast,
    "rewardmath": real_gsm8k,
}
WEIGHTS = {name: weight for members in REWARDBENCH.values() for name, weight in members.items()}
