"""Short paragraphs of invented facts, each with questions and their answers, written for the task ``qa``.

Nothing in them is true, so a model can only know it from the prompt. An answer is in its paragraph word for word, and
in no other one.
"""

from __future__ import annotations

Paragraph = tuple[str, tuple[tuple[str, str], ...]]  # the text, and (question, answer)

PARAGRAPHS: tuple[Paragraph, ...] = (
    (
        "The Ostrava Clock Museum in Pellinghame was founded by the watchmaker Edda Thornbury after she bought a "
        "disused tram depot. Its largest exhibit is a water clock that was built in 1783 and still loses only nine "
        "minutes a month. On Sundays visitors may wind it with a brass key called the Old Heron.",
        (
            ("Who founded the clock museum in Pellinghame?", "Edda Thornbury"),
            ("In which year was the water clock of the museum in Pellinghame built?", "1783"),
            ("What is the brass key of the water clock called?", "Old Heron"),
        ),
    ),
    (
        "The river Mirrow rises below Mount Calder and flows through three lakes before it reaches the town of "
        "Eskby. Its only bridge was designed by the engineer Tobias Wren, who used stone from a quarry at Hollin. "
        "In spring the river turns green from the leaves of the silver alder.",
        (
            ("Below which mountain does the river Mirrow rise?", "Mount Calder"),
            ("Who designed the bridge over the river Mirrow?", "Tobias Wren"),
            ("Which tree's leaves turn the river Mirrow green?", "silver alder"),
        ),
    ),
    (
        "Captain Ilse Varga sailed the schooner Marigold from Port Lennox to the Quillon Islands in 61 days. She "
        "carried roof slates and eleven goats. The logbook of the voyage was found much later in the attic of a "
        "bakery in Dunmere, wrapped in sailcloth.",
        (
            ("What was the name of Captain Ilse Varga's schooner?", "Marigold"),
            ("To which islands did Captain Varga sail?", "Quillon Islands"),
            ("In which town was Captain Varga's logbook found?", "Dunmere"),
        ),
    ),
    (
        "The blue pear of Anselm is a fruit that ripens in the first week of November. It was bred by the monk "
        "Brother Caspian from two older sorts. Growers in the Tessel valley store it in boxes of dry moss, and "
        "press what is left into a cider named Lanternlight.",
        (
            ("In which month does the blue pear of Anselm ripen?", "November"),
            ("Who bred the blue pear of Anselm?", "Brother Caspian"),
            ("What is the cider from blue pears named?", "Lanternlight"),
        ),
    ),
    (
        "The Halvorsen telescope stands on a ridge above the village of Skarn. Its mirror is 412 centimetres wide "
        "and was polished in a former cheese cellar. The first object that was seen through it was the comet Oriel, "
        "which nobody had expected that winter.",
        (
            ("Above which village does the Halvorsen telescope stand?", "Skarn"),
            ("How many centimetres wide is the mirror of the Halvorsen telescope?", "412"),
            ("Which comet was first seen through the Halvorsen telescope?", "Oriel"),
        ),
    ),
    (
        "The opera The Glass Ferryman was written by Leontyne Marsh while she worked as a piano tuner. It had its "
        "first night at the Corn Theatre in Aldwater and lasted five hours. The part of the ferryman is sung by a "
        "bass, and the orchestra needs four anvils.",
        (
            ("Who wrote the opera The Glass Ferryman?", "Leontyne Marsh"),
            ("In which town did The Glass Ferryman have its first night?", "Aldwater"),
            ("Of what does the orchestra of The Glass Ferryman need four?", "anvils"),
        ),
    ),
    (
        "Robot Juniper was built by students of the Bramley Institute to sort mushrooms. It recognises 38 kinds and "
        "sings a low note when it finds a poisonous one. After a fire in the workshop, the robot was rebuilt with "
        "parts of an old combine harvester.",
        (
            ("Which institute's students built the robot Juniper?", "Bramley Institute"),
            ("How many kinds of mushrooms does the robot Juniper recognise?", "38"),
            ("With parts of what was the robot Juniper rebuilt?", "combine harvester"),
        ),
    ),
    (
        "The castle of Redmoor has a tower without any door. People say that its builder, Count Osric the Patient, "
        "wanted to be alone with his falcons. Today the tower can be entered through a tunnel of 290 steps, which a "
        "shepherd named Bettina Crake discovered.",
        (
            ("Who built the castle tower of Redmoor?", "Osric the Patient"),
            ("How many steps does the tunnel to the tower of Redmoor have?", "290"),
            ("Which shepherd discovered the tunnel at Redmoor?", "Bettina Crake"),
        ),
    ),
    (
        "The Winter Post of Norrland was a mail service that used reindeer between Vasby and Umbra. Its founder, "
        "Sigrid Ahlberg, paid the drivers in coffee. The service ended when the railway opened in 1907, but its "
        "green letter boxes may still be seen.",
        (
            ("Which animals did the Winter Post of Norrland use?", "reindeer"),
            ("Who founded the Winter Post of Norrland?", "Sigrid Ahlberg"),
            ("When did the railway end the Winter Post of Norrland?", "1907"),
        ),
    ),
    (
        "The chess master Dorian Pell always opened with the pawn of the king's rook. He won the tournament of "
        "Saint Orlan in this way and received a silver teapot as the prize. His only book, Patience on the Edge, "
        "sold fewer than two hundred copies.",
        (
            ("Which tournament did the chess master Dorian Pell win?", "Saint Orlan"),
            ("What prize did the chess master Dorian Pell receive?", "silver teapot"),
            ("What is the title of Dorian Pell's only book?", "Patience on the Edge"),
        ),
    ),
    (
        "Lake Tamarin is famous for a fish that sleeps in the reeds, the striped dorrin. The biologist Ngozi Adair "
        "counted 5,140 of them in one summer. Fishing is forbidden there except on the feast of the Lanterns, when "
        "every family may take one.",
        (
            ("Which fish is Lake Tamarin famous for?", "striped dorrin"),
            ("Which biologist counted the fish in Lake Tamarin?", "Ngozi Adair"),
            ("On which feast may families fish in Lake Tamarin?", "Lanterns"),
        ),
    ),
    (
        "The first bakery on the island of Sorrel was opened by Matteo Grange, who had been a diver. He made a flat "
        "bread with seaweed that is called tavola. The oven was heated with driftwood, and the bread was sold from "
        "a red rowing boat every morning.",
        (
            ("Who opened the first bakery on the island of Sorrel?", "Matteo Grange"),
            ("What is the flat bread with seaweed from Sorrel called?", "tavola"),
            ("From what was the bread on Sorrel sold?", "rowing boat"),
        ),
    ),
    (
        "The mineral veltrite was found in a salt mine near Ganders by the geologist Petra Olin. It is violet in "
        "daylight and turns yellow under a lamp. A thin slice of it is used in the compass of the research ship "
        "Calypso Anne, since it does not rust.",
        (
            ("Near which town was the mineral veltrite found?", "Ganders"),
            ("Which geologist found the mineral veltrite?", "Petra Olin"),
            ("Which colour has the mineral veltrite in daylight?", "violet"),
        ),
    ),
    (
        "The cycling race called the Long Spoon leads from Farley Cross to the lighthouse at Nab Head. It is 333 "
        "kilometres long, and riders have to carry a wooden spoon in their mouth for the last one. The record is "
        "held by Amparo Ruiz, a dentist.",
        (
            ("Where does the cycling race called the Long Spoon begin?", "Farley Cross"),
            ("How many kilometres long is the race called the Long Spoon?", "333"),
            ("Who holds the record of the race called the Long Spoon?", "Amparo Ruiz"),
        ),
    ),
    (
        "The poet Wilhelmina Stroud wrote all her verses on the backs of railway tickets. Her collection Smoke and "
        "Timetables was printed by a friend in Kettlewick. She is buried under a chestnut tree, beside her dog "
        "Admiral, whom she had taught to bark in rhythm.",
        (
            ("On the backs of what did the poet Wilhelmina Stroud write?", "railway tickets"),
            ("In which town was Wilhelmina Stroud's collection printed?", "Kettlewick"),
            ("What was the name of Wilhelmina Stroud's dog?", "Admiral"),
        ),
    ),
    (
        "In the city of Belmonte trams are driven by compressed air. The system was proposed by Ludovic Hale and "
        "takes its air from a cave under the market. A ride costs two copper buttons, which are minted each year "
        "with the picture of a different puffin.",
        (
            ("By what are the trams in Belmonte driven?", "compressed air"),
            ("Who proposed the tram system of Belmonte?", "Ludovic Hale"),
            ("Which bird is pictured on the copper buttons of Belmonte?", "puffin"),
        ),
    ),
    (
        "The Arden Seed Vault lies in a former wine cellar in Montclair. It holds 72,600 packets, sorted by the "
        "shape of the seed. The keeper, Jonas Feld, checks each of them twice in ten years and writes the result "
        "into ledgers bound in orange cloth.",
        (
            ("In which town does the Arden Seed Vault lie?", "Montclair"),
            ("How many packets does the Arden Seed Vault hold?", "72,600"),
            ("Who is the keeper of the Arden Seed Vault?", "Jonas Feld"),
        ),
    ),
    (
        "The bell of Saint Brannoc cracked during a storm and was mended with tin by the blacksmith Rhoda Penhale. "
        "Since then it sounds like a goose. It weighs 1,870 kilograms and is rung only when the harbour of Trevose "
        "is free of ice.",
        (
            ("Who mended the bell of Saint Brannoc?", "Rhoda Penhale"),
            ("Like which animal does the bell of Saint Brannoc sound?", "goose"),
            ("Of which harbour does the bell of Saint Brannoc say that it is free of ice?", "Trevose"),
        ),
    ),
    (
        "Doctor Yusuf Kellan invented a pillow that cools the neck. He had tested it on passengers of the night "
        "train to Zell, who slept 47 minutes longer with it. The pillow is filled with buckwheat and is sold under "
        "the name Nightbreeze.",
        (
            ("Who invented the pillow that cools the neck?", "Yusuf Kellan"),
            ("With what is the cooling pillow filled?", "buckwheat"),
            ("Under which name is the cooling pillow sold?", "Nightbreeze"),
        ),
    ),
    (
        "The desert village of Qasr Hamra gets its water from nets that catch fog. They were knitted by pupils of "
        "the school, after a plan of their teacher Salma Idris. On a good night the nets give 930 litres, which run "
        "into a cistern of black marble.",
        (
            ("From what do the nets of Qasr Hamra get water?", "fog"),
            ("Which teacher made the plan for the nets of Qasr Hamra?", "Salma Idris"),
            ("How many litres do the nets of Qasr Hamra give on a good night?", "930"),
        ),
    ),
    (
        "The puppet theatre The Third Thumb travels in a yellow fire engine. Its director, Oona Flynn, carves every "
        "head from lime wood. The best known play is about a hedgehog who becomes the mayor of Little Sutton and "
        "abolishes the month of February.",
        (
            ("In what does the puppet theatre The Third Thumb travel?", "fire engine"),
            ("Who is the director of the puppet theatre The Third Thumb?", "Oona Flynn"),
            ("Which animal becomes mayor in the play of The Third Thumb?", "hedgehog"),
        ),
    ),
    (
        "The mountain hut Raven's Rest was carried up in pieces by mules. Its first warden was Gregor Vale, a "
        "retired trumpeter. Hikers who arrive before noon get a bowl of lentil soup, and the guest book lists 26 "
        "marriage proposals.",
        (
            ("Who was the first warden of the hut Raven's Rest?", "Gregor Vale"),
            ("Which soup do hikers get at the hut Raven's Rest?", "lentil"),
            ("How many marriage proposals does the guest book of Raven's Rest list?", "26"),
        ),
    ),
    (
        "The language Ilvani has no word for yesterday. It was described by the linguist Marguerite Sato, who "
        "learned it from two sisters in the port of Anvar. It has 22 vowels, and questions are marked by a click of "
        "the tongue at the end.",
        (
            ("Which linguist described the language Ilvani?", "Marguerite Sato"),
            ("How many vowels does the language Ilvani have?", "22"),
            ("In which port did the linguist learn Ilvani?", "Anvar"),
        ),
    ),
    (
        "The kite festival of Harrowgate Sands began as a quarrel between two tailors. Each year the winner is "
        "given a bolt of scarlet silk. The largest kite so far, named Whale of the Wind, was flown by Henrik Moss "
        "and needed nineteen people to hold it.",
        (
            ("What is the winner of the kite festival of Harrowgate Sands given?", "scarlet silk"),
            ("What was the largest kite at Harrowgate Sands named?", "Whale of the Wind"),
            ("Who flew the largest kite at Harrowgate Sands?", "Henrik Moss"),
        ),
    ),
)
