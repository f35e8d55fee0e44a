"""Measurement: did a method do what it claims, and what did it cost?

    statistics    rates with intervals, paired tests, agreement: functions of arrays
    refusal       the `keywords` judge, refusal and over-refusal rates
    judges        the `local` judge, agreement of any judge with human labels
    endpoint      the `model` judge: any OpenAI-compatible endpoint, cached and counted
    rubrics       what a judging model is asked, word for word
    preference    personal preference, adherence, implicit rewards
    pairwise      win rates, length-controlled
    likelihood    teacher-forced log-probabilities, plain or under a method
    quality       length, repetition, perplexity
    datasets      prompts, pairs and questions from files and known data sets
    items         the prompts of a run and what it takes to judge their responses
    metrics       responses, what they count as, the numbers of a point
    points        the settings of a sweep; choice    which of them to recommend
    judging       a judge from settings; patterns    those of users, bounded in time
    tables        numbers as text and Markdown; pictures    their plots; shapes    what results hold

Importing this package loads nothing; take names from its modules.
"""
