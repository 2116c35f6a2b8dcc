"""Foods, drinks, plants, things and jobs of the demo world; same line form as in `animals`.

A dash as the plural marks a word that has none (bread, milk): it takes no article. A job has no size level.
"""

FOODS = """
apple | apples | 4 | class=fruit | colour=red; green, yellow | taste=sweet; sour \
 | grows=on a tree; in a garden, in a field | use=to make juice; to make a cake, to make wine, to make jam
banana | bananas | 4 | class=fruit | colour=yellow; green | taste=sweet \
 | use=to make a cake; to make juice, to make jam, to make wine
orange | oranges | 4 | class=fruit | colour=orange | taste=sweet; sour | grows=on a tree; in a garden, in a field \
 | use=to make juice; to make a cake, to make wine, to make jam
lemon | lemons | 3 | class=fruit | colour=yellow; green | taste=sour | grows=on a tree; in a garden, in a field \
 | use=to make juice; to make a cake, to make jam
strawberry | strawberries | 2 | class=fruit | colour=red | taste=sweet \
 | grows=near the ground; in a garden, in a field | use=to make jam; to make juice, to make a cake, to make wine
grape | grapes | 1 | class=fruit | colour=green; red, purple, black | taste=sweet; sour \
 | grows=on a vine; in a field, in a garden | use=to make wine; to make juice, to make jam
cherry | cherries | 1 | class=fruit | colour=red; black, yellow | taste=sweet; sour \
 | grows=on a tree; in a garden, in the forest, in a field \
 | use=to make jam; to make juice, to make a cake, to make wine
carrot | carrots | 3 | class=vegetable | colour=orange; purple, yellow | taste=sweet \
 | grows=under the ground; in a garden, in a field | use=to make soup; to make a cake, to make juice
potato | potatoes | 4 | class=vegetable | colour=brown; yellow, red \
 | grows=under the ground; in a garden, in a field | use=to make chips; to make soup
onion | onions | 3 | class=vegetable | colour=brown; white, red, yellow | taste=hot; sweet \
 | grows=under the ground; in a garden, in a field | use=to make soup
bread | - | 0 | colour=brown; white | made=flour | use=to make toast
cheese | - | 0 | colour=yellow; white, orange | taste=salty | made=milk
butter | - | 0 | colour=yellow; white | made=milk | use=to make a cake; to make toast
honey | - | 0 | colour=yellow; brown, orange | taste=sweet | made=nectar
rice | - | 0 | colour=white; brown, black, red | grows=in wet fields; in a field
chocolate | - | 0 | colour=brown; white, black | taste=sweet; bitter | made=cocoa beans \
 | use=to make a cake
"""

DRINKS = """
milk | - | 0 | colour=white | use=to make cheese; to make butter, to make a cake
coffee | - | 0 | colour=black; brown | taste=bitter | made=coffee beans
tea | - | 0 | colour=brown; green, black, red | taste=bitter; sweet | made=leaves
"""

PLANTS = """
rose | roses | 3 | class=flower | colour=red; white, pink, yellow, orange \
 | grows=on a bush; in a garden, near the ground, in a field
sunflower | sunflowers | 6 | class=flower | colour=yellow; orange, yellow and black \
 | grows=in a field; in a garden
oak | oaks | 9 | class=tree | colour=green; brown | grows=in the forest; in a garden, in a field
"""

THINGS = """
car | cars | 8 | class=vehicle | use=to drive to work; to travel, to ride to school | wheels=four wheels \
 | moves=on the road | engine=yes
bus | buses | 9 | class=vehicle | use=to carry many people; to travel, to drive to work, to ride to school \
 | moves=on the road | engine=yes
bike | bikes | 6 | class=vehicle | use=to ride to school; to travel, to drive to work | wheels=two wheels \
 | moves=on the road | engine=no
train | trains | 10 | class=vehicle | use=to carry many people; to travel, to ride to school, to drive to work \
 | moves=on rails
boat | boats | 8 | class=vehicle | use=to cross the water; to travel, to carry many people | wheels=no wheels \
 | moves=on the water
plane | planes | 10 | class=vehicle \
 | use=to fly to far places; to travel, to carry many people, to cross the water | moves=in the air | engine=yes
wheelbarrow | wheelbarrows | 6 | use=to carry earth | place=in the garden; in the shed, in the garage \
 | wheels=one wheel; two wheels | engine=no
hammer | hammers | 4 | class=tool | use=to hit nails | place=in the shed; in the garage \
 | material=of metal; of wood, of metal and wood
saw | saws | 4 | class=tool | use=to cut wood | place=in the shed; in the garage \
 | material=of metal; of metal and wood
knife | knives | 3 | class=tool | use=to cut bread; to cut wood, to eat dinner | place=in the kitchen \
 | material=of metal
spoon | spoons | 3 | class=tool | use=to eat soup; to eat dinner, to drink tea | place=in the kitchen \
 | material=of metal; of wood, of plastic
cup | cups | 3 | use=to drink tea; to drink coffee, to eat soup, to eat dinner \
 | place=in the kitchen; in the living room, in the office
broom | brooms | 5 | class=tool | use=to sweep the floor \
 | place=in the kitchen; in the shed, in the garage, in the garden
key | keys | 2 | use=to open a door | material=of metal
pen | pens | 2 | class=tool | use=to write \
 | place=in the school bag; in the office, in the living room, in the bedroom, in the kitchen \
 | material=of plastic; of metal
lamp | lamps | 5 | use=to light a room; to write \
 | place=in the living room; in the bedroom, in the office, in the kitchen
clock | clocks | 4 | use=to tell the time \
 | place=in the living room; in the kitchen, in the bedroom, in the office
umbrella | umbrellas | 5 | use=to stay dry
bed | beds | 7 | class=piece of furniture | use=to sleep; to sit | place=in the bedroom | wheels=no wheels \
 | material=of wood; of metal
chair | chairs | 6 | class=piece of furniture | use=to sit; to eat dinner, to write \
 | place=in the living room; in the kitchen, in the office, in the bedroom, in the garden \
 | material=of wood; of metal, of plastic | wheels=no wheels
table | tables | 7 | class=piece of furniture | use=to eat dinner; to write, to play games \
 | place=in the kitchen; in the living room, in the office, in the garden, in the bedroom, in the garage \

ball | balls | 4 | class=toy | use=to play games \
 | place=in the garden; in the garage, in the living room, in the bedroom, in the kitchen
drum | drums | 5 | class=musical instrument | use=to make music
guitar | guitars | 5 | class=musical instrument | use=to make music | material=of wood
window | windows | 6 | use=to let in light | material=of glass
"""

JOBS = """
baker | bakers | 0 | does=bake bread | work=in a bakery; in a kitchen
farmer | farmers | 0 | does=grow food; look after the cows | work=on a farm; in a field
doctor | doctors | 0 | does=help sick people | work=in a hospital
teacher | teachers | 0 | does=teach children | work=in a school
pilot | pilots | 0 | does=fly planes | work=in the air
gardener | gardeners | 0 | does=look after the flowers; grow food | work=in a garden
builder | builders | 0 | does=build houses
cook | cooks | 0 | does=make dinner; bake bread | work=in a kitchen; in a hospital, in a school
fireman | firemen | 0 | does=put out fires
"""
