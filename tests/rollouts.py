"""Prompts and answers as reinforcement learning hands them over, and their rewards by the model's own forward."""

import torch
from tiny import bare_tokenizer, chatml_tokenizer, llama_tokenizer, tiny_llama

from grm_hf import GRMForSequenceClassification
from grm_hf.pairs import Encoder


TOKENIZERS = {"chatml": chatml_tokenizer(), "llama": llama_tokenizer(), "bare": bare_tokenizer()}
CHATML = TOKENIZERS["chatml"]
PROMPTS = [
    [{"role": "user", "content": "one two"}],
    [{"role": "user", "content": "one two"}],
    [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "three"},
        {"role": "assistant", "content": "four"},
        {"role": "user", "content": "five six seven"},
    ],
]
ANSWERS = ["good", "bad and long", "six"]


def grm(tokenizer=CHATML, seed=0, **config):
    base = tiny_llama(tokenizer, seed, **config)
    model = GRMForSequenceClassification.from_base(base, head_hidden_size=8).eval()
    with torch.no_grad():
        model.score.out.weight *= 20  # rewards that differ visibly
    return model


def completions(answers=ANSWERS):
    return [[{"role": "assistant", "content": answer}] for answer in answers]


def alone(model, ids):
    """The reward of one unpadded sequence, by the model's own forward."""
    with torch.no_grad():
        return model(torch.tensor([ids])).logits.item()


def expected(model, tokenizer, prompts=PROMPTS, answers=ANSWERS):
    encoder = Encoder(tokenizer)
    return [alone(model, encoder.encode(p, a).ids) for p, a in zip(prompts, answers, strict=True)]


def rollout(tokenizer, prompts=PROMPTS, answers=ANSWERS, end=True):
    """Left-padded prompts and right-padded answers, as PPO concatenates them."""
    pad = tokenizer.pad_token_id
    queries = [
        tokenizer(
            p if isinstance(p, str) else tokenizer.apply_chat_template(p, tokenize=False, add_generation_prompt=True),
            add_special_tokens=False,
        ).input_ids
        for p in prompts
    ]
    replies = [tokenizer(a, add_special_tokens=False).input_ids + [tokenizer.eos_token_id] * end for a in answers]
    context, longest = max(map(len, queries)), max(map(len, replies))
    rows = [
        [pad] * (context - len(q)) + q + r + [pad] * (longest - len(r)) for q, r in zip(queries, replies, strict=True)
    ]
    return torch.tensor(rows), context, [{"prompt": p, "input_ids": q} for p, q in zip(prompts, queries, strict=True)]


def read_by_ppo(model, queries_and_responses, pad_token_id, context_length):
    """What TRL's PPO does with a reward model, written from its contract: the decoder by `base_model_prefix`, the head
    on every position, the reward before the first padding token after the context."""
    real = queries_and_responses != pad_token_id
    decoder = getattr(model, model.base_model_prefix)
    with torch.no_grad():
        out = decoder(
            input_ids=queries_and_responses.masked_fill(~real, 0),
            attention_mask=real,
            position_ids=real.cumsum(1) - real.long(),
            return_dict=True,
            output_hidden_states=True,
            use_cache=False,
        )
        per_token = model.score(out.hidden_states[-1])
    assert per_token.shape == (*real.shape, 1)
    rewards = []
    for row, values in zip(queries_and_responses.tolist(), per_token.squeeze(-1), strict=True):
        response = row[context_length:]
        length = response.index(pad_token_id) if pad_token_id in response else len(response)
        rewards.append(values[context_length + length - 1])
    return torch.stack(rewards)
