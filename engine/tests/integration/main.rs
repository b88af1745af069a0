//! The engine's public face: folders of weights in, pictures out.

mod support;

mod init_images;
mod load_errors;
mod mixed_batch;
mod pictures;
mod precision;
mod requests;
mod sd3;
