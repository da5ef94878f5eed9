//! Reading every generation, writing for every generation.

mod hostile;
mod state;
mod sticky;
mod validators;
mod write;
