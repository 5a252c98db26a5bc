"""Where prompts and pretraining documents come from.

rows (`datasets`, `arithmetic`) -> templated, tokenised prompts (`templates`, `prompts`), and token
sequences for next-token training (`documents`). Nothing here knows the policy or the engine.
"""
