#![no_main]

libfuzzer_sys::fuzz_target!(|story: &[u8]| busway::cli::hostile::settings(story));
