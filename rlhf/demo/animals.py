"""Animals of the demo world, one line each.

Line form: `name | plural | size level | attribute=values | ...`. Values before `;` are the ones the writers use; values
after it are also true, so that the judge does not punish a true statement that the writers never make. An attribute
that has no clear answer for an animal (the colour of a dog) is left out instead of being given a doubtful one.
Size levels are steps on a rough scale from 1 (insect) to 10 (whale); only animals two steps apart are compared.
"""

ANIMALS = """
cow | cows | 8 | class=mammal | food=grass, hay; leaves, plants | home=on a farm; in a field, in the grassland \
 | legs=four legs | cover=fur | active=during the day | fly=no | sound=moo
horse | horses | 8 | class=mammal | food=grass, hay; leaves, plants \
 | home=on a farm; in a field, in the grassland | legs=four legs | cover=fur | active=during the day | fly=no \
 | sound=neigh
sheep | sheep | 7 | class=mammal | food=grass, hay; leaves, plants \
 | home=on a farm; in a field, in the grassland, in the mountains | legs=four legs | cover=wool \
 | active=during the day | colour=white; black, brown | fly=no | sound=baa
pig | pigs | 7 | class=mammal | food=roots; plants, fruit, grass, seeds, nuts, insects, leaves, meat, mice \
 | home=on a farm | legs=four legs | active=during the day | colour=pink; black, brown | fly=no | sound=oink
hen | hens | 5 | class=bird | food=seeds; insects, plants, grass, fruit, mice, meat, frogs | home=on a farm \
 | legs=two legs | cover=feathers | active=during the day | sound=cluck
duck | ducks | 5 | class=bird | food=water plants; seeds, insects, plants, grass, fish, frogs \
 | home=at a pond; on a farm, in a river | legs=two legs | cover=feathers | fly=yes | swim=yes | sound=quack
dog | dogs | 6 | class=mammal | food=meat; fish, bones, rabbits, mice | home=in a house; on a farm, in a field \
 | legs=four legs | cover=fur | active=during the day | fly=no | swim=yes | sound=woof
cat | cats | 5 | class=mammal | food=mice, fish; meat, birds | home=in a house; on a farm | legs=four legs \
 | cover=fur | fly=no | sound=meow
rabbit | rabbits | 5 | class=mammal | food=grass, carrots; hay, leaves, plants \
 | home=in a burrow; in a field, on a farm, in the grassland, in the forest, in a house | legs=four legs \
 | cover=fur | fly=no
mouse | mice | 3 | class=mammal | food=seeds; nuts, fruit, insects, plants, grass, roots \
 | home=in a field; in a house, in a burrow, on a farm, in the forest, in the grassland, in the desert \
 | legs=four legs | cover=fur | active=at night | colour=grey; brown, white | fly=no | sound=squeak
fox | foxes | 6 | class=mammal | food=rabbits, mice; birds, meat, fruit, insects, fish, frogs \
 | home=in the forest; in a burrow, in a field, on the ice, in the mountains, in the grassland, in the desert \
 | legs=four legs | cover=fur | active=at night | colour=red; orange, grey, white | fly=no
wolf | wolves | 7 | class=mammal | food=meat; rabbits, sheep, mice \
 | home=in the forest; in the mountains, in the grassland | legs=four legs | cover=fur \
 | colour=grey; white, black | fly=no | swim=yes
bear | bears | 8 | class=mammal \
 | food=fish, honey, fruit; meat, insects, leaves, grass, nuts, roots, plants, seeds \
 | home=in the forest; in a cave, in the mountains | legs=four legs | cover=fur | colour=brown; black | fly=no \
 | swim=yes
lion | lions | 8 | class=mammal | food=meat; zebras | home=in the grassland | legs=four legs | cover=fur \
 | fly=no | sound=roar
tiger | tigers | 8 | class=mammal | food=meat; fish, birds | home=in the jungle; in the forest, in the grassland \
 | legs=four legs | cover=fur | colour=orange and black; orange | fly=no | swim=yes | sound=roar
zebra | zebras | 8 | class=mammal | food=grass; leaves, plants | home=in the grassland | legs=four legs \
 | cover=fur | colour=black and white | fly=no
elephant | elephants | 9 | class=mammal | food=grass, leaves, fruit; roots, plants, hay \
 | home=in the grassland; in the jungle, in the forest | legs=four legs | cover=thick skin | colour=grey; brown \
 | fly=no | swim=yes
giraffe | giraffes | 9 | class=mammal | food=leaves; plants, fruit, grass | home=in the grassland \
 | legs=four legs | cover=fur | fly=no
camel | camels | 8 | class=mammal | food=grass, leaves; plants, hay, seeds \
 | home=in the desert; on a farm, in the grassland | legs=four legs | cover=fur | active=during the day \
 | colour=brown; white | fly=no
owl | owls | 5 | class=bird | food=mice; insects, rabbits, birds, frogs, fish, meat \
 | home=in the forest; on a farm, in the desert, in the grassland, in the mountains, in a field, in the jungle \
 | legs=two legs | cover=feathers | active=at night | fly=yes | sound=hoot
eagle | eagles | 6 | class=bird | food=fish, rabbits; mice, birds, meat, snakes \
 | home=in the mountains; in the forest, in the grassland, in the desert | legs=two legs | cover=feathers \
 | active=during the day | colour=brown; black, white | fly=yes
crow | crows | 4 | class=bird | food=seeds, insects; fruit, nuts, meat, mice, frogs \
 | home=in a field; in the forest, on a farm, in the mountains | legs=two legs | cover=feathers \
 | active=during the day | colour=black | fly=yes | sound=caw
penguin | penguins | 6 | class=bird | food=fish | home=on the ice; in the sea | legs=two legs | cover=feathers \
 | active=during the day | colour=black and white | fly=no | swim=yes
frog | frogs | 3 | food=insects; flies | home=at a pond; in the jungle, in the forest, in a field, in a river \
 | legs=four legs | cover=smooth skin | colour=green; brown, yellow, red, black | fly=no | swim=yes \
 | sound=croak
snake | snakes | 4 | class=reptile | food=mice, frogs; birds, rabbits, insects, fish, meat, sheep \
 | home=in the grassland; in the desert, in the jungle, in the forest, in a field, in a burrow | legs=no legs \
 | cover=scales | fly=no | sound=hiss
crocodile | crocodiles | 8 | class=reptile | food=fish, zebras; meat, birds, frogs \
 | home=in a river; in the jungle, in the sea, at a pond | legs=four legs | cover=scales \
 | colour=green; brown, grey | fly=no | swim=yes
shark | sharks | 8 | class=fish | food=fish; meat | home=in the sea | legs=no legs | colour=grey; blue, white \
 | fly=no | swim=yes
whale | whales | 10 | class=mammal | food=fish; meat | home=in the sea | legs=no legs | cover=smooth skin \
 | colour=grey; blue, black, white, black and white | fly=no | swim=yes
bee | bees | 1 | class=insect | food=nectar; honey, plants \
 | home=in a hive; in a field, in the forest, on a farm, in the grassland | legs=six legs \
 | active=during the day | colour=yellow and black; black, yellow, brown | fly=yes | swim=no | sound=buzz
butterfly | butterflies | 1 | class=insect | food=nectar; plants, fruit \
 | home=in a field; in the forest, in the jungle, in the grassland | legs=six legs | active=during the day \
 | fly=yes | swim=no
spider | spiders | 1 | food=insects; flies \
 | home=in a web; in a house, in the forest, in a field, in the jungle, in the desert, in the grassland, \
   in a cave, on a farm, at a pond \
 | legs=eight legs | fly=no
bat | bats | 3 | class=mammal | food=insects; fruit, nectar, flies \
 | home=in a cave; in the forest, in a house, in the jungle, on a farm, in the desert, in the mountains, in a field \
 | legs=two legs | cover=fur | active=at night | colour=brown; black, grey | fly=yes
"""
