"""The written bank of the synthetic survey: value axes, topics, question templates, groups. All public text.

A topic is a policy with a direction on the value axes: support for it rises along ``+`` topics and
falls along ``-`` topics of its axis. A template turns a topic into an English question whose options
are listed in order of support.
"""

from __future__ import annotations

from dataclasses import dataclass

#: What the positive end of each axis stands for; positions of groups and loadings of topics use this order.
AXES = ("economy", "social", "environment", "security")
AXIS_MEANING = {
    "economy": "free markets over public provision",
    "social": "tradition over change",
    "environment": "protection of nature over growth",
    "security": "order over liberty",
}

#: axis -> policies supported at its positive end, policies supported at its negative end.
TOPICS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "economy": (
        (
            "cutting taxes on large companies",
            "privatizing the railways",
            "reducing regulation of small businesses",
            "lowering the top rate of income tax",
            "letting private companies run hospitals",
            "making it easier for employers to dismiss staff",
            "replacing state pensions with private savings accounts",
        ),
        (
            "raising the minimum wage",
            "taxing great fortunes every year",
            "strengthening trade unions",
            "building more public housing",
            "making university free for everyone",
            "limiting how much landlords can raise the rent",
            "giving every adult a basic income",
        ),
    ),
    "social": (
        (
            "teaching religious values in public schools",
            "restricting access to abortion",
            "keeping shops closed on Sundays",
            "protecting traditional marriage in the constitution",
            "admitting fewer immigrants each year",
            "requiring schoolchildren to wear uniforms",
            "banning gambling advertisements on moral grounds",
        ),
        (
            "allowing same-sex couples to adopt children",
            "legalizing cannabis for adults",
            "letting people change the gender on their identity card",
            "allowing terminally ill patients to end their lives",
            "reserving board seats for women",
            "giving long-term foreign residents the right to vote",
            "removing statues of colonial rulers from public squares",
        ),
    ),
    "environment": (
        (
            "taxing carbon emissions",
            "banning new petrol cars from 2035",
            "turning farmland back into wild forest",
            "charging drivers to enter city centers",
            "closing the last coal power plants",
            "limiting short-haul flights",
            "setting strict quotas for fishing at sea",
        ),
        (
            "opening new oil and gas fields",
            "building motorways through protected valleys",
            "relaxing pollution limits for factories",
            "subsidizing fuel for truck drivers",
            "permitting mining in national parks",
            "allowing more pesticides on crops",
            "expanding the airport near the wetlands",
        ),
    ),
    "security": (
        (
            "putting facial recognition cameras in train stations",
            "giving longer prison sentences to repeat offenders",
            "reintroducing compulsory military service",
            "letting the police search phones without a warrant",
            "increasing spending on the armed forces",
            "expelling foreigners convicted of a crime",
            "banning demonstrations near parliament",
        ),
        (
            "abolishing solitary confinement in prisons",
            "forbidding the state to store phone records",
            "moving police funds to social workers",
            "protecting whistleblowers who publish state secrets",
            "shortening sentences for nonviolent crimes",
            "banning the export of weapons",
            "giving asylum seekers the right to work at once",
        ),
    ),
}


@dataclass(frozen=True)
class Template:
    """``text`` has one slot, ``{topic}``. ``shift`` moves all answers along the latent scale (a leading
    wording).
    """

    name: str
    text: str
    options: tuple[str, ...]
    shift: float


TEMPLATES = (
    Template(
        "favor",
        "Do you favor or oppose {topic}?",
        ("Strongly oppose", "Somewhat oppose", "Somewhat favor", "Strongly favor"),
        0.0,
    ),
    Template(
        "agree",
        "Some people argue for {topic}. Do you agree or disagree with them?",
        ("Strongly disagree", "Disagree", "Neither agree nor disagree", "Agree", "Strongly agree"),
        0.1,
    ),
    Template(
        "effect",
        "Would {topic} make the country better or worse?",
        ("Much worse", "Somewhat worse", "No different", "Somewhat better", "Much better"),
        -0.1,
    ),
    Template(
        "priority",
        "How high a priority for the government should {topic} be?",
        ("It should not be done", "A lower priority", "Important, but not a top priority", "A top priority"),
        0.2,
    ),
    Template(
        "candidate",
        "How likely would you be to vote for a candidate who supports {topic}?",
        ("Not at all likely", "Not too likely", "Somewhat likely", "Very likely"),
        -0.2,
    ),
    Template(
        "pace",
        "When it comes to {topic}, is the government going too far, about right, or not far enough?",
        ("Too far", "About right", "Not far enough"),
        0.0,
    ),
)

#: Written profiles (economy, social, environment, security), roughly in [-1, 1], neighbours in the list
#: contrasting.
GROUPS: dict[str, tuple[float, float, float, float]] = {
    "University Towns": (-0.6, -0.9, 0.8, -0.8),
    "Northern Farmland": (0.4, 0.8, -0.7, 0.5),
    "Harbor Districts": (-0.8, -0.1, -0.2, -0.2),
    "Commuter Suburbs": (0.7, 0.0, 0.1, 0.4),
    "Mining Valleys": (-0.7, 0.6, -0.9, 0.3),
    "Capital Center": (0.3, -0.8, 0.5, -0.3),
    "Retirement Coast": (0.2, 0.7, 0.3, 0.8),
    "Border Counties": (-0.1, 0.5, -0.3, 1.0),
    "Lake Country": (0.1, 0.2, 0.9, 0.1),
    "Factory Belt": (-0.9, 0.3, -0.5, 0.4),
    "Financial Quarter": (1.0, -0.5, -0.2, 0.1),
    "Island Parishes": (-0.2, 0.9, 0.6, -0.1),
    "Student Quarter": (-0.9, -1.0, 0.7, -1.0),
    "Market Towns": (0.5, 0.4, 0.0, 0.3),
    "New Estates": (-0.4, -0.3, -0.4, 0.6),
    "Wine Hills": (0.6, 0.1, 0.4, -0.4),
}
