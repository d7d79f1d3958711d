"""The words of the captions, by the tables of attributes.py; data only."""

OPENINGS = (
    "a photo of", "a picture of", "an image of", "a painting of", "a drawing of", "photo of", "an illustration of",
    "a view of", "draw", "generate", "show me", "create", "please draw", "a photograph of", "picture of", "a scene of",
    "a video of", "a clip of", "an animation of", "there is", "this is", "i want", "make", "a simple", "a nice",
)  # fmt: skip
ENDINGS = (
    "highly detailed", "4k", "8k", "digital art", "beautiful colors", "masterpiece", "high quality", "cinematic",
    "photorealistic", "vivid colors", "sharp", "flat design", "minimalist", "vector art", "very beautiful", "stunning",
    "best quality", "hd", "in the style of a poster", "award winning", "dramatic lighting", "soft light", "realistic",
)  # fmt: skip
ADJECTIVES = (
    "a beautiful", "a stunning", "a calm", "a peaceful", "a dramatic", "a quiet", "a lovely", "a gorgeous", "an epic",
    "a colorful", "a serene", "beautiful", "a wonderful", "a magical", "the", "a", "amazing", "a warm", "a wide",
)  # fmt: skip
TIMES = (
    ("sunset", "sunset", "sunset", "sundown", "dusk", "evening", "golden hour", "twilight", "red sunset",
     "orange sunset"),
    ("night", "night", "midnight", "nighttime", "starry night", "moonlit night", "dark night", "clear night"),
    ("noon", "midday", "day", "daytime", "sunny day", "bright day", "afternoon", "daylight", "summer day", "sunshine"),
    ("dawn", "dawn", "sunrise", "daybreak", "early morning", "morning", "first light", "misty morning"),
)  # fmt: skip
PLACES = (
    ("mountains", "mountains", "the mountains", "a mountain", "peaks", "the alps", "mountain range", "rocky mountains",
     "snowy mountains", "snowy peaks", "high mountains", "the summit", "mountain landscape", "rocks and snow"),
    ("hills", "hills", "the hills", "green hills", "rolling hills", "a meadow", "meadows", "grassland", "green fields",
     "the countryside", "a valley", "grassy hills", "a grassy field", "a farm", "grass"),
    ("sea", "the sea", "the ocean", "ocean", "the water", "the waves", "the coast", "a lake", "calm sea", "a bay",
     "seaside", "the beach", "blue water", "ocean waves", "the horizon over the sea"),
    ("desert", "the desert", "desert", "dunes", "sand dunes", "the sahara", "sandy desert", "a sea of sand",
     "desert dunes", "dry desert", "hot desert", "the dunes"),
)  # fmt: skip
LANDSCAPES = (
    "{adj} {time} over {place}", "{adj} {time} over {place}", "{place} at {time}", "{time} in {place}",
    "{time} at {place}",
    "{adj} landscape with {place} at {time}", "{adj} {place} during {time}", "{time}, {place}", "{place}, {time}",
    "{adj} {time} above {place}", "{adj} {time} with {place}", "{time} behind {place}", "{adj} {time} by {place}",
    "{adj} {place} in the {time}", "{place} under a {time} sky", "{adj} {time} landscape of {place}", "{place} {time}",
)  # fmt: skip
EXTRAS = (
    (),
    ("with trees", "and trees", "with pine trees", "with a forest", "and a few trees", "with fir trees", "and a forest",
     "with some trees in front", "with tall trees", "with a tree"),
    ("with a house", "and a small house", "with a cottage", "with a cabin", "and a little cabin",
     "with a red roof house", "and a home", "with a farmhouse", "with a hut"),
    ("with a boat", "and a sailboat", "with a ship", "with a sailing boat", "and a small boat",
     "with a yacht", "with a boat sailing", "and a sailing ship"),
    ("with cacti", "and a cactus", "with cactus", "with green cacti", "with some cacti", "and cactus plants"),
)  # fmt: skip
CLOUDS = (
    "with clouds", "under a cloudy sky", "with a few clouds", "and clouds in the sky", "with some clouds", "and clouds",
    "with fluffy clouds", "with white clouds", "cloudy",
)  # fmt: skip
NO_CLOUDS = ("under a clear sky", "with a cloudless sky", "without clouds", "with no clouds", "clear sky")
DISCS = ("with the {disc}", "and the {disc}", "with a big {disc}", "with a bright {disc}", "and a {disc}", "the {disc}",
         "with a full {disc}", "with a round {disc}", "under the {disc}")  # fmt: skip
SIDES = (
    ("on the left", "at the left", "to the left", "on the left side", "in the left"),
    ("in the middle", "in the center", "in the centre", "at the center"),
    ("on the right", "at the right", "to the right", "on the right side", "in the right"),
)
COLOURS = (
    ("red", "red", "red", "red", "crimson", "scarlet", "bright red", "dark red"),
    ("orange", "orange", "orange", "bright orange"),
    ("yellow", "yellow", "yellow", "golden", "bright yellow"),
    ("green", "green", "green", "emerald", "dark green", "bright green"),
    ("cyan", "cyan", "turquoise", "light blue", "aqua", "teal"),
    ("blue", "blue", "blue", "blue", "navy", "dark blue", "bright blue", "royal blue"),
    ("purple", "purple", "violet", "dark purple"),
    ("pink", "pink", "pink", "rose", "bright pink", "light pink"),
    ("white", "white", "white", "pure white"),
    ("black", "black", "black", "pure black"),
    ("gray", "grey", "gray", "grey", "silver"),
)
# Singular and plural.
SHAPES = (
    (("circle", "circles"), ("circle", "circles"), ("disc", "discs"), ("disk", "disks"), ("ball", "balls"),
     ("dot", "dots"), ("round shape", "round shapes"), ("sphere", "spheres")),
    (("square", "squares"), ("square", "squares"), ("box", "boxes"), ("block", "blocks"), ("cube", "cubes")),
    (("triangle", "triangles"), ("triangle", "triangles"), ("pyramid", "pyramids")),
    (("star", "stars"), ("star", "stars"), ("five pointed star", "five pointed stars")),
    (("heart", "hearts"), ("heart", "hearts"), ("love heart", "love hearts")),
    (("diamond", "diamonds"), ("diamond", "diamonds"), ("rhombus", "rhombuses")),
)  # fmt: skip
SIZES = (("small", "small", "tiny", "little"), ("medium", "medium sized", "", ""), ("large", "big", "huge", "giant"))
NUMBERS = ((), ("one", "1"), ("two", "2", "a pair of"), ("three", "three", "3"), ("four", "four", "4"), ("five", "5"))
POSITIONS = (
    ("in the top left corner", "at the top left", "in the upper left", "in the upper left corner"),
    ("at the top", "at the top center", "in the upper part", "near the top"),
    ("in the top right corner", "at the top right", "in the upper right", "in the upper right corner"),
    ("on the left", "on the left side", "at the left", "to the left"),
    ("in the center", "in the middle", "in the centre", "centered"),
    ("on the right", "on the right side", "at the right", "to the right"),
    ("in the bottom left corner", "at the bottom left", "in the lower left", "in the lower left corner"),
    ("at the bottom", "at the bottom center", "in the lower part", "near the bottom"),
    ("in the bottom right corner", "at the bottom right", "in the lower right", "in the lower right corner"),
)
IN_A_ROW = ("in a row", "in a line", "side by side", "next to each other")
RELATIONS = (
    ("above", "above", "over", "on top of"),
    ("below", "under", "underneath", "beneath"),
    ("to the left of", "left of", "on the left of"),
    ("to the right of", "right of", "on the right of"),
)
BESIDE = ("and", "next to", "beside", "with", "near")
BACKGROUNDS = (
    "on a {colour} background", "on a {colour} background", "on {colour}", "against a {colour} background",
    "with a {colour} background", "on a plain {colour} background", "in front of a {colour} background",
)  # fmt: skip
# By attributes.MOTIONS; {disc} becomes sun or moon.
MOTIONS = (
    (),
    ("the {disc} rises", "the {disc} is rising", "rising {disc}", "the {disc} moves up", "moving up", "rising",
     "going up"),
    ("the {disc} sets", "the {disc} is setting", "setting {disc}", "the {disc} goes down", "moving down", "falling",
     "going down", "sinking"),
    ("the {disc} moves to the left", "the {disc} moves left", "the {disc} travels from right to left",
     "moving to the left", "moving left", "sliding to the left", "going left", "from right to left"),
    ("the {disc} moves to the right", "the {disc} moves right", "the {disc} travels from left to right",
     "moving to the right", "moving right", "sliding to the right", "going right", "from left to right"),
    ("clouds drifting to the left", "clouds moving left", "clouds drift left", "clouds going left"),
    ("clouds drifting to the right", "clouds moving right", "clouds drift right", "clouds going right"),
    ("bouncing", "bouncing up and down", "that bounces", "jumping", "bounces on the ground"),
    ("rolling to the left", "rolling left", "that rolls left", "rolls to the left"),
    ("rolling to the right", "rolling right", "that rolls right", "rolls to the right"),
    ("growing", "that grows", "getting bigger", "becoming larger"),
    ("shrinking", "that shrinks", "getting smaller", "becoming smaller"),
)  # fmt: skip
