//! The engine's public face: folders of weights in, pictures out.

mod company;
mod golden;
mod recipe;
mod support;

mod elsewhere;
mod encoders;
mod flux;
mod handed_over;
mod init_images;
mod inspect;
mod layouts;
mod load_errors;
mod mixed_batch;
mod pictures;
mod precision;
mod requests;
mod sd3;
mod single_file;
