"""Tokens that may come next, guessed cheaply and checked together: one step of the model reads
every expert once for all of them, and keeps those that it would have made one by one.

`decoder.Decoder` is the page to read. A draft changes no token: each is drawn from the model's
own logits, by the draws that it would have had, and guesses decide only how many of them a step
gives. That needs one arithmetic for one row and for many, which the bundle's program has."""
