#![no_main]

mod seeds;

libfuzzer_sys::fuzz_target!(
    init: {
        // Where `scripts/fuzz` wants what to begin with, that is all.
        if let Some(folder) = std::env::var_os("BUSWAY_FUZZ_SEEDS") {
            seeds::write("tests/kvm/clients".as_ref(), folder.as_ref()).expect("the seeds");
            std::process::exit(0);
        }
    },
    |story: &[u8]| busway::control::hostile::request(story)
);
