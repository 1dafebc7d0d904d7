for (const slider of document.querySelectorAll('.slider')) {
  const images = slider.querySelectorAll('img'), input = slider.querySelector('input');
  const caption = slider.querySelector('figcaption');
  const show = () => images.forEach((image, index) => {
    image.hidden = index !== Number(input.value);
    if (!image.hidden) caption.textContent = image.alt;
  });
  input.addEventListener('input', show);
  input.hidden = images.length < 2;
  show();
}
