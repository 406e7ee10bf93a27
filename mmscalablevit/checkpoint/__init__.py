# Copyright (c) mmscalablevit contributors. All rights reserved.
