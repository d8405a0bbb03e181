#![no_main]

libfuzzer_sys::fuzz_target!(|story: &[u8]| busway::machine::hostile::board(story));
